"""`edge-sd bench` and `make bench`, which print the figures of docs/benchmarks.md and the README."""
