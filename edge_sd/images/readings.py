"""The ways to read a picture as the condition of a ControlNet, by name."""

from __future__ import annotations

# White lines on black, its greys, or its colours; see lines.py.
READINGS = ("auto", "canny", "scribble", "lines", "grey", "tile")
