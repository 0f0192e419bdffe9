"""`python -m edge_sd.apps.bench` is `edge-sd bench`."""

from __future__ import annotations

import sys

from ..cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "bench")
    main()
