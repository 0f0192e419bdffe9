"""ControlNet: a drawn outline says where things are, the prompt says what they are."""

from PIL import Image, ImageDraw

from edge_sd import Control, Pipeline, Request

# "scribble": dark strokes on light paper. "canny" finds the edges of a photograph.
sketch = Image.new("RGB", (128, 128), "white")
ImageDraw.Draw(sketch).ellipse((24, 28, 104, 108), outline="black", width=3)

with Pipeline.open("emoji") as pipeline:
    request = Request("a cookie, 3d style", controls=[Control(sketch, reading="scribble")], seed=3)
    pipeline.generate(request).save("controlnet.png")
