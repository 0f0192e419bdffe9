"""Image to image: a picture is the start of another one. `strength` is how much of it is drawn anew."""

from edge_sd import Pipeline, Request

with Pipeline.open("emoji") as pipeline:
    apple = pipeline.generate(Request("a red apple, glossy style", seed=7)).pictures[0].image
    for strength in (0.4, 0.7):
        # A file's path works as well as a PIL picture.
        request = Request("a green apple, glossy style", image=apple, strength=strength, seed=7)
        pipeline.generate(request).save(f"image_to_image-{strength}.png")
