"""`make bench`: all tables."""

from __future__ import annotations

from .commands import bench

if __name__ == "__main__":
    bench()
