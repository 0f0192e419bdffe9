"""Graphs of weights that are stored in bfloat16: what of them stays in 16 bits becomes float16, as in other exports.

OpenVINO's GPUs and NPUs, and programs that read these files, expect float16 beside integers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

LARGEST = float(np.finfo(np.float16).max)


def leave_bfloat16(model: Any) -> None:
    """Replace constants of bfloat16 by float16, or float32 where they are beyond it, and drop roundings to bfloat16."""
    from openvino import opset13 as ops

    for op in model.get_ordered_ops():
        if not op.get_output_size() or op.get_output_element_type(0).get_type_name() != "bf16":
            continue
        if op.get_type_name() == "Constant":
            values = op.get_data(dtype=np.float32)
            fits = not values.size or float(np.abs(values).max()) <= LARGEST
            made = ops.constant(values.astype(np.float16) if fits else values)
            made.set_friendly_name(op.get_friendly_name())
            op.output(0).replace(made.output(0))
        elif op.get_type_name() == "Convert":
            # Weights of fewer bits are made float32 in two steps, of which the first would round their scales.
            for reader in list(op.output(0).get_target_inputs()):
                if reader.get_node().get_type_name() == "Convert":
                    reader.replace_source_output(op.input_value(0))
    model.validate_nodes_and_infer_types()
