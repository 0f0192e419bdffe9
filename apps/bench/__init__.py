"""`edge-sd bench` and `make bench`: what every figure of the README was printed by."""
