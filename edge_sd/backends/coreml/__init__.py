"""Core ML: runs `.mlpackage`s in Apple's layout; on macOS by Core ML itself, elsewhere by an executor in torch.

backend   the devices, and from a package to a component
edits     what a request changes of a package: LoRAs, words of one's own, CLIP skip
plan      where Core ML says that each operation runs
"""

from .backend import CoreMLBackend

__all__ = ["CoreMLBackend"]
