"""Inpainting: only what is white in the mask is drawn anew. Every byte outside it stays, seam aside."""

import numpy as np
from PIL import Image, ImageDraw

from edge_sd import Pipeline, Request

with Pipeline.open("emoji") as pipeline:
    face = pipeline.generate(Request("a grinning face, flat style", seed=5)).pictures[0].image

    mask = Image.new("L", face.size)
    ImageDraw.Draw(mask).rectangle((0, 0, face.width, face.height // 3), fill=255)

    request = Request("a red heart, flat style", image=face, mask=mask, mask_blur=0, seed=1)
    result = pipeline.generate(request)

result.save("inpaint.png")
kept = np.asarray(mask) == 0
assert (np.asarray(face)[kept] == np.asarray(result.pictures[0].image)[kept]).all()
