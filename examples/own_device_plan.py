"""Own device plan: see what was chosen and why, then choose the device and the variant by hand."""

from edge_sd import Pipeline, Request

with Pipeline.open("emoji", preference="quality") as pipeline:
    print(pipeline.plan.explain())

# A device by name is never left: if it fails, so does the picture. Names: `edge-sd devices`.
with Pipeline.open("emoji", device="cpu", variant="openvino-fp16") as pipeline:
    for part, placement in pipeline.plan.parts.items():
        print(part, placement.variant, placement.device.name)
    pipeline.generate(Request("a hamburger, 3d style", seed=4)).save("own_device_plan.png")
