"""`edge-sd batch`: options, and what they start."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge_sd.errors import EdgeSDError, InvalidRequest, ModelNotFound, choices

from .. import machine
from ..drawing import parse_device
from ..options import AsJson, Quiet
from ..request_options import takes_request
from ..terminal import progress, say

if TYPE_CHECKING:
    from edge_sd.pipeline.pipeline import Pipeline

    from .keeping import Keeper
    from .manifest import Job, Manifest
    from .rows import Row

ENDINGS = ("png", "jpg", "webp")
# Seconds between two looks at the battery.
PATIENCE = 30.0


@dataclass(frozen=True)
class Place:
    """Which model draws, and where: the arguments of Pipeline.open."""

    model: str
    variant: str | None
    device: str
    prefer: str
    preset: str
    low_memory: bool

    def open(self, tell: Callable[[str], None]) -> Pipeline:
        """The pipeline; `tell` gets lines on measuring."""
        from edge_sd.pipeline.pipeline import Pipeline

        placed = parse_device(self.device)
        return Pipeline.open(
            self.model, placed, self.variant, self.prefer, tell, self.preset, self.low_memory, measure=True
        )


@takes_request
def batch(
    wishes: dict[str, Any],
    prompts: Annotated[
        str, typer.Argument(metavar="FILE|-", help="Rows: .csv, .jsonl, or .txt with a prompt on each line.")
    ],
    folder: Annotated[
        Path | None, typer.Option("--output", "-o", help="The folder for the pictures. Default: the file's name.")
    ] = None,
    rows: Annotated[str | None, typer.Option(help="csv, jsonl or txt. Default: by the file's ending.")] = None,
    ending: Annotated[str, typer.Option("--type", help="Of the pictures: png, jpg, webp.")] = "png",
    contact_sheet: Annotated[
        bool, typer.Option("--contact-sheet", help="All pictures in small at the end, with numbers and prompts.")
    ] = False,
    min_battery: Annotated[
        int | None, typer.Option(metavar="PERCENT", help="On battery, wait while its charge is below this.")
    ] = None,
    allow_download: Annotated[
        bool,
        typer.Option("--allow-download", help="Pull a --model ORG/NAME that is not here; else no network is used."),
    ] = False,
    preset: Annotated[str | None, typer.Option(help="As for generate.")] = None,
    model: Annotated[str | None, typer.Option(help="As for generate.")] = None,
    variant: Annotated[str | None, typer.Option(help="As for generate.")] = None,
    device: Annotated[str, typer.Option(help="As for generate.")] = "auto",
    prefer: machine.Prefer = "speed",
    low_memory: Annotated[bool, typer.Option("--low-memory", help="As for generate.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Draw a file of requests into a folder; stopped, killed or cut off, the same command goes on where it was.

    Columns and keys are the options of a request, as they are called here; options given here are for rows without
    them.
    """
    place = Place(model or "emoji", variant, device, prefer, preset or "exact", low_memory)
    draw_batch(
        prompts, wishes, place, folder, rows=rows, ending=ending, contact_sheet=contact_sheet, min_battery=min_battery,
        allow_download=allow_download, as_json=as_json, quiet=quiet,
    )  # fmt: skip


def draw_batch(
    source: str, wishes: dict[str, Any], place: Place, folder: Path | None, *, rows: str | None = None,
    ending: str = "png", contact_sheet: bool = False, min_battery: int | None = None, allow_download: bool = False,
    as_json: bool = False, quiet: bool = False,
) -> None:  # fmt: skip
    """Draw all rows of `source`. Raises typer.Exit(1) where some could not be drawn, or what is wrong with the rows."""
    from edge_sd.files import locked

    from .keeping import Keeper
    from .manifest import Manifest
    from .rows import read_rows

    if ending not in ENDINGS:
        raise InvalidRequest(f"unknown type of pictures {ending!r}; valid: {choices(ENDINGS)}")
    if min_battery is not None and not 1 <= min_battery <= 99:
        raise InvalidRequest(f"--min-battery {min_battery} is not a whole number from 1 to 99")
    folder = _folder(source, folder)
    read = read_rows(source, rows, wishes)
    silent = quiet or as_json

    def tell(line: str) -> None:
        if not silent:
            say(line, error=True)

    place = _there(place, allow_download, silent)
    with ExitStack() as stack:
        pipeline = stack.enter_context(place.open(tell))
        check(read, pipeline)
        try:
            stack.enter_context(locked(folder / "batch", seconds=0))
        except TimeoutError:
            raise InvalidRequest(f"another batch is drawing into {folder}") from None
        manifest = Manifest(folder)
        jobs = manifest.jobs(read, {"model": pipeline.bundle.name, "variant": place.variant, "preset": place.preset})
        left = manifest.left(jobs)
        keeper = Keeper(manifest, f".{ending}", silent)
        tell(_begin(pipeline, manifest, jobs, left))
        if left:
            from .drawing import draw

            ready = _battery(min_battery, tell)
            with progress(silent, "loading") as report:
                draw(left, pipeline, keeper, ready, report)
    _finish(jobs, manifest, keeper, contact_sheet, as_json, tell)


def _folder(source: str, folder: Path | None) -> Path:
    """Where pictures go: the folder that is named, or one called like the file."""
    from edge_sd.images.files import FORMATS

    if folder is None:
        return Path("batch" if source == "-" else Path(source).stem)
    if folder.suffix.lower() in FORMATS or folder.is_file():
        raise InvalidRequest(f"the output {str(folder)!r} is a file; the pictures of many rows need a folder")
    return folder


def _there(place: Place, allow_download: bool, silent: bool) -> Place:
    """`place` with its model on this machine: pulled, if that is allowed, where it is not here yet."""
    from dataclasses import replace

    from edge_sd.bundle import hub
    from edge_sd.bundle.library import find_model

    try:
        find_model(place.model)
    except ModelNotFound as error:
        if not hub.NAME.fullmatch(place.model):
            raise
        if not allow_download:
            raise ModelNotFound(f"{error}; --allow-download pulls it") from None
        from ..run import prepared

        return replace(place, model=str(prepared(place.model, None, None, None, "fp16", True, silent)))
    return place


def check(rows: list[Row], pipeline: Pipeline) -> None:
    """Refuse what the model can't draw, naming the line, before anything is drawn. Raises InvalidRequest."""
    for row in rows:
        try:
            pipeline.resolve(row.request)
        except EdgeSDError as error:
            raise type(error)(f"{row.where}: {error}") from error


def _begin(pipeline: Pipeline, manifest: Manifest, jobs: list[Job], left: list[Job]) -> str:
    done = len(jobs) - len(left)
    line = f"{len(jobs)} pictures into {manifest.folder}" + (f", {done} of them done before" if done else "")
    before = {manifest.done[job.key].variant for job in jobs if job.key in manifest.done} - {pipeline.plan.variant}
    if left and before:
        line += f" by {choices(before)}: expect small differences to {pipeline.plan.variant}"
    return f"{line}\n{pipeline.plan.summary()}" if left else line


def _battery(least: int | None, tell: Callable[[str], None]) -> Callable[[], None]:
    """A function that waits while this machine runs on a battery below `least` percent."""
    from edge_sd.machine import this_machine

    def ready() -> None:
        said = False
        while least is not None:
            here = this_machine()
            if not here.on_battery or here.charge is None or here.charge >= least:
                break
            if not said:
                tell(f"the battery is at {here.charge} %, below {least} %: waiting for mains")
                said = True
            time.sleep(PATIENCE)

    return ready


def _finish(
    jobs: list[Job], manifest: Manifest, keeper: Keeper, contact_sheet: bool, as_json: bool, tell: Callable[[str], None]
) -> None:
    done = [(job, manifest.done[job.key]) for job in jobs if job.key in manifest.done]
    sheets: list[Path] = []
    if contact_sheet and done:
        from .sheet import write_sheets

        captions = [
            (manifest.folder / each.file, f"{each.row}, seed {each.seed}: {job.request.prompt}") for job, each in done
        ]
        sheets = write_sheets(manifest.folder, captions)
        for path in sheets:
            tell(f"contact sheet: {path}")
    if as_json:
        pictures = [{**asdict(each), "prompt": job.request.prompt} for job, each in done]
        print(json.dumps({
            "folder": str(manifest.folder), "pictures": pictures, "contact_sheets": list(map(str, sheets)),
            "failed": keeper.failed, "notes": keeper.notes,
        }, indent=2))  # fmt: skip
    if keeper.failed:
        tell(f"{len(keeper.failed)} rows were not drawn; the same command tries them again")
        raise typer.Exit(1)
