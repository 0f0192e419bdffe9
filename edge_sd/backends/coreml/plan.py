"""Where Core ML runs each operation of a compiled model: what its own plan says, on macOS 14.4 and newer."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ...errors import DeviceError

ENGINES = {
    "MLNeuralEngineComputeDevice": "Neural Engine",
    "MLGPUComputeDevice": "GPU",
    "MLCPUComputeDevice": "CPU",
}


def placements(compiled: Path, units: str, function: str) -> Counter[str]:
    """Engine -> how many operations of a `.mlmodelc` it is to run; constants are run by none.

    `units` is the name of a coremltools.ComputeUnit. Raises DeviceError where the system has no such plan.
    """
    import coremltools as ct

    try:
        from coremltools.models.compute_plan import MLComputePlan

        plan = MLComputePlan.load_from_path(str(compiled), getattr(ct.ComputeUnit, units))
        operations = plan.model_structure.program.functions[function].block.operations
        usages = [plan.get_compute_device_usage_for_mlprogram_operation(each) for each in operations]
    except Exception as error:  # The library raises errors of any type, AttributeError on old systems.
        detail = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DeviceError(f"Core ML tells no plan of {compiled.name} (macOS 14.4 or newer does): {detail}") from error
    return Counter(
        ENGINES.get(type(each.preferred_compute_device).__name__, "another") for each in usages if each is not None
    )
