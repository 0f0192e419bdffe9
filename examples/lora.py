"""LoRA: a small file of differences changes the weights when they are loaded; nothing is converted again.

The LoRA here came with the embedded model: it draws in four steps without guidance (Luo et al. 2023).
"""

from pathlib import Path

import edge_sd
from edge_sd import Pipeline, Request

file = Path(edge_sd.__file__).parent / "models/emoji/lcm/pytorch_lora_weights.safetensors"

with Pipeline.open("emoji") as pipeline:
    # Several files add up; each has its weight.
    request = Request("a red apple, glossy style", loras={file: 1.0}, steps=4, guidance=1.0, sampler="lcm", seed=7)
    result = pipeline.generate(request)

result.save("lora.png")
print(result.seconds)
