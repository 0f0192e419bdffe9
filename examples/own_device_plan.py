"""Own device plan: see what was chosen and why, then choose devices and variants by hand."""

from dataclasses import replace

from edge_sd import Pipeline, Request

with Pipeline.open("emoji", preference="quality") as pipeline:
    plan = pipeline.plan
    print(plan.explain())

# One device for each component, "auto" for the rest; names are those of `edge-sd devices`. A device that was asked for
# is never left: if it fails, so does the picture.
with Pipeline.open("emoji", device={"unet": "cpu", "vae_decoder": "cpu"}, variant="openvino-fp16") as pipeline:
    pipeline.generate(Request("a hamburger, 3d style", seed=4)).save("own_devices.png")

# A whole plan, followed as it is: here the decoder is taken from another variant than the UNet.
decoder = replace(plan.parts["vae_decoder"], variant="openvino-fp16-lcm")
with Pipeline.open("emoji", plan=replace(plan, parts={**plan.parts, "vae_decoder": decoder})) as pipeline:
    for part, placement in pipeline.plan.parts.items():
        print(part, placement.variant, placement.device.name)
    pipeline.generate(Request("a hamburger, 3d style", seed=4)).save("own_device_plan.png")
