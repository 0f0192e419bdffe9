"""`edge-sd compare`: the variants of a model side by side, in figures and in pictures."""
