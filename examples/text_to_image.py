"""Text to image: a prompt becomes a picture that carries its parameters."""

from edge_sd import Pipeline, Request

with Pipeline.open("emoji") as pipeline:
    result = pipeline.generate(Request("a red apple, glossy style", seed=7))

result.save("text_to_image.png")
print(result.plan)
