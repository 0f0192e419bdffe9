"""Own device plan: see what was chosen and why, then choose devices and the variant by hand."""

from edge_sd import Pipeline, Request

with Pipeline.open("emoji", preference="quality") as pipeline:
    print(pipeline.plan.explain())

# One device for each component, "auto" for the rest; names are those of `edge-sd devices`. A device that was asked for
# is never left: if it fails, so does the picture.
with Pipeline.open("emoji", device={"unet": "cpu", "vae_decoder": "cpu"}, variant="openvino-fp16") as pipeline:
    for part, placement in pipeline.plan.parts.items():
        print(part, placement.variant, placement.device.name)
    pipeline.generate(Request("a hamburger, 3d style", seed=4)).save("own_device_plan.png")
