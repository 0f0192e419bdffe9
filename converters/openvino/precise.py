"""Operations of a graph that are computed in float32 whatever the rest is computed in.

Of a file, because OpenVINO has no name for it in Python: its CPU and GPU leave alone what has the attribute `precise`
in its graphs (`DisablePrecisionConversion` inside).
"""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

# The sums of linear attention (Katharopoulos et al. 2020, arXiv:2006.16236) over all places of a picture, and the
# quotient of two of them, which diffusers computes in float32, too.
LINEAR_ATTENTION = r".*\.attn1?/aten::(matmul/MatMul|slice/Slice|add/Add|div/Divide).*"


def keep_float32(graph: Path, names: str = LINEAR_ATTENTION) -> int:
    """Mark the operations whose names match in the saved `graph`, and return their number."""
    tree = ElementTree.parse(graph)
    marked = 0
    for layer in tree.iterfind("./layers/layer"):
        if layer.get("type") == "Const" or not re.fullmatch(names, layer.get("name", "")):
            continue
        told = layer.find("rt_info")
        if told is None:
            told = ElementTree.Element("rt_info")
            # Before the ports, as OpenVINO writes it.
            layer.insert(1 if layer.find("data") is not None else 0, told)
        ElementTree.SubElement(told, "attribute", name="precise", version="0")
        marked += 1
    if marked:
        tree.write(graph, encoding="utf-8", xml_declaration=True)
    return marked
