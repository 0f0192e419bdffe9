"""Preview and stop: `steps` is the loop itself. Look at each step's picture, and stop by not going on."""

from PIL import Image

from edge_sd import Pipeline, Request

with Pipeline.open("emoji") as pipeline:
    for step in pipeline.steps(Request("a rocket, flat style", seed=1)):
        # x0, what the model takes the finished picture to be, through the tiny decoder.
        preview = pipeline.decode(step.denoised, "tiny")
        print(f"step {step.index + 1} of {step.total}")
        if step.index == 11:
            break

    Image.fromarray(preview).save("preview_and_stop.png")
