"""Pixels: files, canvases, grids, edges and metrics. Knows no model."""
