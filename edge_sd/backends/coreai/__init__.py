"""Core AI, the format that follows Core ML: runs `.aimodel`s in Apple's layout by Apple's own runtime, everywhere.

backend   the devices, and from an asset to a component
runtime   the runtime's event loop, assets and their functions
"""

from .backend import CoreAIBackend

__all__ = ["CoreAIBackend"]
