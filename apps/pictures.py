"""`edge-sd interpolate` and `info`: pictures between two, and how one was made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge_sd.errors import InvalidRequest

from . import machine
from .drawing import parse_device, parse_size
from .options import AsJson, Overwrite, Quiet
from .saving import free_path, refuse_existing
from .terminal import messages, plain, progress, say, say_json

if TYPE_CHECKING:
    from edge_sd.pipeline.request import Request
    from edge_sd.pipeline.result import Picture


def interpolate(
    prompt: Annotated[str, typer.Argument(help="What the first picture shows.")],
    toward: Annotated[str | None, typer.Argument(help="What the last one shows. Default: the same.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the first picture. Default: random.")] = None,
    toward_seed: Annotated[int | None, typer.Option(help="Of the last picture. Default: the same.")] = None,
    frames: Annotated[int, typer.Option(help="Pictures, with the first and the last, to 120.")] = 8,
    seconds: Annotated[float, typer.Option(help="How long a GIF takes to get there.")] = 2.0,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    size: Annotated[str | None, typer.Option(metavar="N|WxH", help="Pixels of each.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A .gif, or a strip as .png, .jpg, .webp. Default: interpolation.gif"),
    ] = None,
    overwrite: Overwrite = False,
    model: Annotated[str, typer.Option(help="A name or a folder.")] = "emoji",
    variant: Annotated[str | None, typer.Option(help="As for generate.")] = None,
    device: Annotated[str, typer.Option(help="As for generate.")] = "auto",
    prefer: machine.Prefer = "speed",
    quiet: Quiet = False,
) -> None:
    """Go from one prompt or seed to another, as an animation or a strip of pictures."""
    from edge_sd.images.files import check_output
    from edge_sd.pipeline.pipeline import Pipeline

    if not 2 <= frames <= 120:
        raise InvalidRequest(f"frames {frames} is not a whole number from 2 to 120")
    if not 0.1 <= seconds <= 600:
        raise InvalidRequest(f"seconds {seconds:g} is not a number from 0.1 to 600")
    if toward is None and toward_seed is None:
        raise InvalidRequest("there is nothing to go towards: give a second prompt or --toward-seed")
    path = free_path(Path("interpolation.gif")) if output is None else output
    check_output(path.with_suffix(".png") if _animated(path) else path)
    refuse_existing(path, overwrite)
    width, height = parse_size(size)
    same: dict[str, Any] = {"prompt": prompt, "toward": toward, "steps": steps, "width": width, "height": height}
    requests = _frames(frames, toward_seed, seed, **same)
    tell = messages(quiet)
    drawn: list[Picture] = []
    with (
        Pipeline.open(model, parse_device(device), variant, prefer, tell, measure=not quiet) as pipeline,
        progress(quiet, "loading") as report,
    ):
        for n, request in enumerate(requests):
            report(f"drawing {n + 1} of {frames}", n / frames)
            drawn += pipeline.generate(request).pictures
    path = _write_strip(drawn, path, seconds, overwrite)
    if not quiet:
        say(path)


def _animated(path: Path) -> bool:
    return path.suffix.lower() == ".gif"


def _frames(frames: int, toward_seed: int | None, seed: int | None, **same: Any) -> list[Request]:
    """The request of each picture; the share of what they go towards grows evenly from 0 to 1."""
    import secrets

    from edge_sd.pipeline.request import MAX_SEED, Request

    first = secrets.randbelow(MAX_SEED) if seed is None else seed
    requests = []
    for n in range(frames):
        share = n / (frames - 1)
        second: dict[str, Any] = {}
        if toward_seed is not None and n:
            second = {"variation_seed": toward_seed, "variation_strength": share}
        requests.append(Request(seed=first, toward_share=share, **same, **second))
    return requests


def _write_strip(drawn: list[Picture], path: Path, seconds: float, overwrite: bool) -> Path:
    """Write pictures as an animation or side by side in one; returns where, which is free if it need be."""
    from dataclasses import replace

    from edge_sd.images.files import FORMATS, write
    from edge_sd.images.grids import animation, grid

    images = [each.image for each in drawn]
    if _animated(path):
        data = animation(images, seconds)
    else:
        data = replace(drawn[0], image=grid(images, columns=len(images))).encode(FORMATS[path.suffix.lower()])
    try:
        return write(data, path, new=not overwrite)
    except FileExistsError:
        # Another process wrote it meanwhile.
        return write(data, free_path(path))


def info(
    image: Annotated[Path, typer.Argument(help="A PNG, JPEG or WebP picture.")],
    as_json: AsJson = False,
) -> None:
    """Say how a picture was made, by edge-sd or by another program."""
    from edge_sd.pipeline.recorded import read_recorded

    recorded = read_recorded(image)
    if as_json:
        say_json(recorded.as_dict())
        return
    maker = f"edge-sd {recorded.version}" if recorded.exact else recorded.program
    about = {name: getattr(recorded, name) for name in ("model", "model_hash", "variant", "device")}
    waiting = {**recorded.for_image, **recorded.for_mask}
    rows = {"drawn by": maker, **recorded.settings, **waiting, **about, **recorded.others}
    for name, value in rows.items():
        if value not in (None, ""):
            say(f"{plain(name.replace('_', ' ')):16}  {value}")
