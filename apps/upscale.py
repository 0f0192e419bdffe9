"""`edge-sd upscale`: a picture made larger, by a model that draws each piece anew, or by a resampler."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_sd.errors import InvalidRequest

from . import machine
from .drawing import deliver, parse_device, step_progress
from .options import AsJson, Overwrite, Quiet
from .saving import Saver, free_path
from .terminal import messages, say, say_json

if TYPE_CHECKING:
    from PIL.Image import Image

# Prompt for a picture whose file has none.
ANYTHING = "a detailed picture, sharp focus"
STRENGTH = 0.3
# Models of fewer pixels draw a whole thing of their own into each piece of a photograph.
LEAST_PIXELS = 256 * 256


def upscale(
    image: Annotated[Path, typer.Argument(help="The picture to make larger.")],
    scale: Annotated[float, typer.Option(help="Times as wide and high, to 8.")] = 2.0,
    prompt: Annotated[
        str | None, typer.Option(help="What it shows. Default: what it was drawn by, where its file says.")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="How much is drawn anew: more detail, less likeness. Default: 0.3.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps, of which the strength is taken.")] = None,
    seed: Annotated[int | None, typer.Option(help="Default: random.")] = None,
    tile: Annotated[int | None, typer.Option(help="Pixels a side of the pieces. Default: the model's size.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: NAME-x2.png beside it.")] = None,
    model: Annotated[str, typer.Option(help="A name or a folder.")] = "emoji",
    variant: Annotated[str | None, typer.Option(help="As for generate.")] = None,
    device: Annotated[str, typer.Option(help="As for generate.")] = "auto",
    prefer: machine.Prefer = "speed",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make a picture larger: each piece drawn anew a little, the overlaps blended at every step.

    Without a strength, a model that has an upscaler takes that. One of few pixels, which would put things of its own
    there, resamples.
    """
    import numpy as np
    from PIL import Image

    from edge_sd.bundle.bundle import ModelBundle
    from edge_sd.bundle.parts import UPSCALER
    from edge_sd.images.opening import open_picture
    from edge_sd.pipeline.pipeline import Pipeline
    from edge_sd.pipeline.request import Request

    if not 1 < scale <= 8:
        raise InvalidRequest(f"scale {scale:g} is not a number above 1, up to 8")
    opened = open_picture(image, "image")
    silent = quiet or as_json
    path = output or free_path(image.with_name(f"{image.stem}-x{scale:g}.png"))
    saver = Saver(path, "", 1, overwrite=overwrite, say=not silent)
    saver.check()
    bundle = ModelBundle.open(model)
    defaults = bundle.defaults
    if strength is None and any(UPSCALER in each.artifacts for each in bundle.variants.values()):
        with Pipeline.open(model, parse_device(device), variant, prefer, messages(silent)) as pipeline:
            if pipeline.upscales:
                large = Image.fromarray(pipeline.enlarge(np.asarray(opened.convert("RGB"))))
                why = f"enlarged by the upscaler of {bundle.name} to {large.width}x{large.height}, then to its size"
                _write(_resized(large, opened, scale), path, why, overwrite, as_json, quiet)
                return
    if strength is None and defaults.width * defaults.height < LEAST_PIXELS:
        why = (
            f"{bundle.name} draws {defaults.width}x{defaults.height} pixels and would put things of its own into a "
            f"larger picture: it was resampled (Lanczos); a larger --model, or --strength {STRENGTH}, draws it anew"
        )
        _write(_resized(opened, opened, scale), path, why, overwrite, as_json, quiet)
        return
    tell = messages(silent)
    with Pipeline.open(model, parse_device(device), variant, prefer, tell, measure=True) as pipeline:
        factor = pipeline.bundle.facts.latents.factor
        width, height = (max(1, round(side * scale / factor)) * factor for side in opened.size)
        side = tile or pipeline.bundle.defaults_of(pipeline.plan.variant).width
        request = Request(
            prompt or _prompt_of(image), width=width, height=height, steps=steps, seed=seed, image=opened,
            strength=strength or STRENGTH, tile=side,
        )  # fmt: skip
        run = pipeline.run(request)  # Report mistakes before anything is printed.
        tell(pipeline.expected(run).summary())
        with saver, step_progress(request, silent) as on_step:
            result = pipeline.draw(run, on_step, saver.save)
    deliver(result, saver, as_json, quiet)


def _prompt_of(image: Path) -> str:
    """What a picture was drawn by, where its file says."""
    from edge_sd.pipeline.recorded import read_recorded

    try:
        return str(read_recorded(image).settings["prompt"])
    except InvalidRequest:
        return ANYTHING


def _resized(image: Image, original: Image, scale: float) -> Image:
    """`image` as `scale` times the size of `original`, by Lanczos' filter."""
    from PIL.Image import Resampling

    width, height = (max(1, round(side * scale)) for side in original.size)
    return image.resize((width, height), Resampling.LANCZOS)


def _write(large: Image, path: Path, why: str, overwrite: bool, as_json: bool, quiet: bool) -> None:
    """Save a picture that was not drawn, and say why."""
    from edge_sd.images.files import FORMATS, encode, write

    write(encode(large, FORMATS[path.suffix.lower()]), path, new=not overwrite)
    if as_json:
        say_json({"pictures": [{"path": str(path), "width": large.width, "height": large.height}], "notes": [why]})
    elif not quiet:
        say(path)
        say(f"note: {why}", error=True)
