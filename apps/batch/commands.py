"""`edge-sd batch`: options, and what they start."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge_sd.errors import EdgeSDError, InvalidRequest, ModelNotFound, choices

from .. import completion, machine
from ..options import AsJson, Quiet
from ..request_options import takes_request
from ..terminal import progress, say, say_json
from .place import Place

if TYPE_CHECKING:
    from edge_sd.pipeline.pipeline import Pipeline

    from .keeping import Keeper
    from .manifest import Job, Manifest
    from .rows import Row

ENDINGS = ("png", "jpg", "webp")
# Seconds between two looks at the battery.
PATIENCE = 30.0


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
    dask: Annotated[
        str | None, typer.Option(metavar="tcp://…", help="Draw on the workers of the Dask cluster at this address.")
    ] = None,
    allow_download: Annotated[
        bool,
        typer.Option("--allow-download", help="Pull a --model ORG/NAME that is not here; else no network is used."),
    ] = False,
    preset: Annotated[str | None, typer.Option(help="As for generate.", autocompletion=completion.presets)] = None,
    model: Annotated[str | None, typer.Option(help="As for generate.", autocompletion=completion.models)] = None,
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
    how = How(rows, ending, contact_sheet, min_battery, dask, allow_download, as_json, quiet)
    draw_batch(prompts, wishes, place, folder, how)


@dataclass(frozen=True)
class How:
    """The options of a batch beside those of its requests, checked.

    Raises InvalidRequest.
    """

    rows: str | None = None
    ending: str = "png"
    contact_sheet: bool = False
    min_battery: int | None = None
    dask: str | None = None
    allow_download: bool = False
    as_json: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.ending not in ENDINGS:
            raise InvalidRequest(f"unknown type of pictures {self.ending!r}; valid: {choices(ENDINGS)}")
        if self.min_battery is not None and self.dask is not None:
            raise InvalidRequest("--min-battery is of this machine, and --dask has others draw")
        if self.min_battery is not None and not 1 <= self.min_battery <= 99:
            raise InvalidRequest(f"--min-battery {self.min_battery} is not a whole number from 1 to 99")

    @property
    def silent(self) -> bool:
        """Whether nothing is said on the way."""
        return self.quiet or self.as_json

    def tell(self, line: str) -> None:
        """Say a line on standard error."""
        if not self.silent:
            say(line, error=True)


def draw_prompts(
    source: str, wishes: dict[str, Any], place: Place, folder: Path | None, beside: Mapping[str, Any], how: How
) -> None:
    """`generate --prompts`: draw_batch, but for options of `generate` that `beside` holds and that a batch has not."""
    if given := [name for name, value in beside.items() if value]:
        raise InvalidRequest(f"--prompts takes no {given[0]} beside it")
    draw_batch(source, wishes, place, folder, how)


def draw_batch(source: str, wishes: dict[str, Any], place: Place, folder: Path | None, how: How) -> None:
    """Draw all rows of `source`. Raises typer.Exit(1) where some could not be drawn, or what is wrong with the rows."""
    from edge_sd.files import locked

    from . import cluster, drawing
    from .keeping import Keeper
    from .manifest import Manifest
    from .rows import read_rows

    folder = _folder(source, folder)
    read = read_rows(source, how.rows, wishes)
    place = _there(place, how)
    with ExitStack() as stack:
        pipeline = stack.enter_context(place.open(how.tell, measure=how.dask is None))
        check(read, pipeline)
        try:
            stack.enter_context(locked(folder / "batch", seconds=0))
        except TimeoutError:
            raise InvalidRequest(f"another batch is drawing into {folder}") from None
        manifest = Manifest(folder)
        jobs = manifest.jobs(read, {"model": pipeline.bundle.name, "variant": place.variant, "preset": place.preset})
        left = manifest.left(jobs)
        keeper = Keeper(manifest, f".{how.ending}", how.silent)
        how.tell(_begin(pipeline, manifest, jobs, left))
        with progress(how.silent or not left, "loading") as report:
            if left and how.dask is not None:
                cluster.draw(left, how.dask, place, keeper, report, how.tell)
            elif left:
                how.tell(pipeline.plan.summary())
                drawing.draw(left, pipeline, keeper, _battery(how.min_battery, how.tell), report)
    _finish(jobs, manifest, keeper, how)


def _folder(source: str, folder: Path | None) -> Path:
    """Where pictures go: the folder that is named, or one called like the file."""
    from edge_sd.images.files import FORMATS

    if folder is None:
        return Path("batch" if source == "-" else Path(source).stem)
    if folder.suffix.lower() in FORMATS or folder.is_file():
        raise InvalidRequest(f"the output {str(folder)!r} is a file; the pictures of many rows need a folder")
    return folder


def _there(place: Place, how: How) -> Place:
    """`place` with its model on this machine: pulled, if that is allowed, where it is not here yet."""
    from edge_sd.bundle import hub
    from edge_sd.bundle.library import find_model

    try:
        find_model(place.model)
    except ModelNotFound as error:
        if not hub.NAME.fullmatch(place.model):
            raise
        if not how.allow_download:
            raise ModelNotFound(f"{error}; --allow-download pulls it") from None
        from ..run import prepared

        return replace(place, model=str(prepared(place.model, None, None, None, "fp16", True, how.silent)))
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
    return line


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


def _finish(jobs: list[Job], manifest: Manifest, keeper: Keeper, how: How) -> None:
    done = [(job, manifest.done[job.key]) for job in jobs if job.key in manifest.done]
    sheets: list[Path] = []
    if how.contact_sheet and done:
        from .sheet import write_sheets

        captions = [
            (manifest.folder / each.file, f"{each.row}, seed {each.seed}: {job.request.prompt}") for job, each in done
        ]
        sheets = write_sheets(manifest.folder, captions)
        for path in sheets:
            how.tell(f"contact sheet: {path}")
    if how.as_json:
        pictures = [{**asdict(each), "prompt": job.request.prompt} for job, each in done]
        say_json(
            {
                "folder": str(manifest.folder), "pictures": pictures, "contact_sheets": list(map(str, sheets)),
                "failed": keeper.failed, "notes": keeper.notes,
            }
        )  # fmt: skip
    if keeper.failed:
        how.tell(f"{len(keeper.failed)} rows were not drawn; the same command tries them again")
        raise typer.Exit(1)
