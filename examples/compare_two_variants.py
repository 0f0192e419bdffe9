"""Compare two variants: one request drawn with both, and how near the pictures are. `edge-sd compare` does more."""

import numpy as np

from edge_sd import Pipeline, Request
from edge_sd.images.metrics import PEAK, psnr, ssim

request = Request("a red heart, glossy style", seed=9)
pictures = {}
for variant in ("openvino-fp16", "openvino-fp16-lcm"):
    with Pipeline.open("emoji", variant=variant) as pipeline:
        result = pipeline.generate(request)
    result.save(f"compare_two_variants-{variant}.png")
    pictures[variant] = np.asarray(result.pictures[0].image)
    print(f"{variant}: {result.pictures[0].settings.steps} steps, {result.seconds['denoise']:.2f} s")

first, second = pictures.values()
print(f"PSNR {psnr(second, first, PEAK):.1f} dB, SSIM {ssim(second, first):.3f}")
