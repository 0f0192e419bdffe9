"""OpenVINO: runs `openvino_model.xml` graphs in the layout of optimum-intel on CPU, GPU and NPU.

backend     the devices, and with which settings a component is loaded there
loading     from files to a component, by:
reading     a graph of known shapes
edits       what a request changes of it: LoRAs, textual inversions, CLIP skip
graph       rewrites that give the same picture with less arithmetic
adapters    LoRAs as inputs of it
streaming   its weights as inputs, read where their file is mapped
mapping     pages of such files, given back
cache       compiled graphs on disk
component   what was compiled, as the pipeline sees it
"""

from .backend import OpenVINOBackend

__all__ = ["OpenVINOBackend"]
