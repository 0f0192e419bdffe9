"""Nodes for ComfyUI: a loader and a sampler over Pipeline.

A file of one line in ComfyUI's custom_nodes, edge_sd.py, has ComfyUI find them:

    from edge_sd.apps.comfyui import *
"""

from __future__ import annotations

from .nodes import EdgeSDLoader, EdgeSDSampler

# What ComfyUI looks for in a module of custom nodes.
NODE_CLASS_MAPPINGS = {"EdgeSDLoader": EdgeSDLoader, "EdgeSDSampler": EdgeSDSampler}
NODE_DISPLAY_NAME_MAPPINGS = {"EdgeSDLoader": "edge-sd: load model", "EdgeSDSampler": "edge-sd: draw"}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
