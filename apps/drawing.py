"""Shared by the commands that draw: parsing of sizes and seeds, the progress bar, and the output."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sd.errors import InvalidRequest

from .terminal import progress, say, say_json

if TYPE_CHECKING:
    from edge_sd.pipeline.request import Request
    from edge_sd.pipeline.result import Result
    from edge_sd.sampling.samplers import Step

    from .saving import Saver


def one(values: list[Any] | None) -> Any:
    """The value of a repeatable option that was given once; a list of those given more often; None where none was."""
    return values[0] if values and len(values) == 1 else values or None


def parse_size(size: str | None) -> tuple[int | None, int | None]:
    """Width and height of "512" or "512x768". Raises InvalidRequest."""
    if size is None:
        return None, None
    match = re.fullmatch(r"(\d{1,6})(?:[xX×](\d{1,6}))?", size.strip())
    if match is None:
        raise InvalidRequest(f"size {size!r} is neither a number nor WIDTHxHEIGHT, such as 512 or 512x768")
    return int(match[1]), int(match[2] or match[1])


def parse_seeds(seed: str | None, count: int | None) -> tuple[int | None, int | None]:
    """The first seed and the count of "7", or of "5-12", which is eight pictures. Raises InvalidRequest."""
    if seed is None:
        return None, count
    match = re.fullmatch(r"(-?\d{1,20})(?:-(\d{1,20}))?", seed.strip())
    if match is None:
        raise InvalidRequest(f"seed {seed!r} is neither a number nor a range, such as 5-12")
    first = int(match[1])
    if match[2] is None:
        return first, count
    many = int(match[2]) - first + 1
    if many < 1 or count not in (None, many):
        wrong = "runs backwards" if many < 1 else f"has {many} seeds, --count says {count}"
        raise InvalidRequest(f"the range of seeds {seed} {wrong}")
    return first, many


def parse_device(device: str) -> str | dict[str, str]:
    """A device's name, or component -> name of "unet=gpu,vae_decoder=cpu". Raises InvalidRequest."""
    if "=" not in device:
        return device
    placed: dict[str, str] = {}
    for each in device.split(","):
        part, _, name = (word.strip() for word in each.partition("="))
        if not part or not name:
            raise InvalidRequest(f"device {device!r}: {each!r} is not COMPONENT=DEVICE, such as unet=gpu")
        if part in placed:
            raise InvalidRequest(f"device {device!r} names two devices for {part}")
        placed[part] = name
    return placed


def parse_extend(extend: str | None) -> tuple[int, ...] | None:
    """Four numbers of "0,64,0,0". Raises InvalidRequest."""
    if extend is None:
        return None
    parts = extend.split(",")
    if len(parts) != 4 or not all(re.fullmatch(r"\s*\d{1,6}\s*", part) for part in parts):
        raise InvalidRequest(f"extend {extend!r} is not left,right,top,bottom in pixels, such as 0,64,0,0")
    return tuple(map(int, parts))


def parse_lora(text: str) -> tuple[Path, float]:
    """File and weight of "FILE:0.8"; without one it is 1. Raises InvalidRequest."""
    name, _, weight = text.rpartition(":")
    if not name or Path(text).is_file():
        return Path(text), 1.0
    try:
        return Path(name), float(weight)
    except ValueError:
        raise InvalidRequest(f"LoRA {text!r}: {weight!r} is no weight, such as in FILE:0.8") from None


def parse_embedding(text: str) -> tuple[str, Path]:
    """Word and file of "FILE:WORD", or of a file that has its word inside or in its name.

    Raises InvalidRequest or InvalidModel.
    """
    from edge_sd.text.textual_inversion import read_embedding

    name, _, word = text.rpartition(":")
    if not name or Path(text).is_file():
        name, word = text, ""
    return read_embedding(Path(name), word or None).word, Path(name)


@contextmanager
def step_progress(request: Request, silent: bool) -> Iterator[Callable[[int, Step], None]]:
    """The bar over all steps of all pictures; yields the callback for Pipeline.generate."""
    with progress(silent, "loading") as report:

        def on_step(n: int, step: Step) -> None:
            which = "" if request.count == 1 else f" {n + 1} of {request.count}"
            done = (n * step.total + step.index + 1) / (request.count * step.total)
            report(f"drawing{which}, step {step.index + 1} of {step.total}", done)

        yield on_step


def deliver(result: Result, saver: Saver, as_json: bool, quiet: bool) -> None:
    """Say what the saved pictures are: seeds and notes, or all about them as JSON."""
    notes = [*result.notes, *saver.notes]
    if as_json:
        say_json({**_report(result, saver.paths), "notes": notes})
    elif not quiet:
        seeds = [picture.settings.seed for picture in result.pictures]
        say(f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]}-{seeds[-1]}", error=True)
        for note in notes:
            say(f"note: {note}", error=True)


def _report(result: Result, paths: list[Path]) -> dict[str, Any]:
    from dataclasses import asdict

    pictures = [
        {"path": str(path), **asdict(picture.settings), "model": picture.model, "model_hash": picture.model_hash,
         "variant": picture.variant, "device": picture.device}
        for path, picture in zip(paths, result.pictures, strict=True)
    ]  # fmt: skip
    return {"pictures": pictures, "plan": result.plan, "seconds": result.seconds}
