"""`edge-sd bench`: this machine's own tables, in Markdown or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from edge_sd.errors import InvalidRequest, MissingExtra, choices

from ..terminal import Watch, progress

# "conversion" prints Core ML's, too.
TABLES = (
    "embedded",
    "together",
    "quality",
    "large",
    "lora",
    "profile",
    "conversion",
    "coreai",
    "serving",
    "determinism",
)
# Too large and too long to be of those that are measured by default.
LONG = ("transformers", "transformers-conversion", "transformers-klein", "transformers-sd35")


def bench(
    tables: Annotated[
        list[str] | None,
        typer.Argument(help=f"Which tables: {', '.join((*TABLES, *LONG))}. Default: all but the last {len(LONG)}."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="A model of yours, in place of the tables.")] = None,
    variant: Annotated[list[str] | None, typer.Option(help="Its variants. Default: all.")] = None,
    device: Annotated[str, typer.Option(help="Where it is drawn.")] = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each program; the table has their medians.")] = 3,
    pictures: Annotated[int, typer.Option(min=2, help="Pictures of the table of quality.")] = 64,
    load: Annotated[
        float | None,
        typer.Option(min=8, max=86_400, help="Seconds of the steady load of serving. Default: 8 a round."),
    ] = None,
    home: Annotated[
        Path | None,
        typer.Option(help="Where the large random model (6 GB; of transformers 50 GB) is kept. Default: the cache."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document, in seconds and bytes.")] = False,
) -> None:
    """Measure this machine: your model's variants, or edge-sd beside openvino.genai, optimum-intel and diffusers."""
    if model is None and (variant or device != "auto"):
        raise InvalidRequest("--variant and --device are of --model")
    if model is not None and tables:
        raise InvalidRequest(f"--model has tables of its own; leave out {choices(tables)}")
    for name in tables or ():
        if name not in (*TABLES, *LONG):
            raise InvalidRequest(f"unknown table {name!r}; valid: {choices((*TABLES, *LONG))}")
    if load is not None and (model is not None or (tables and "serving" not in tables)):
        raise InvalidRequest("--load is of the table serving")
    from .process import machine

    with progress(False, "measuring") as report:
        made = (
            _own(model, variant or [], device, rounds, report)
            if model
            else _beside(tables or TABLES, rounds, pictures, load, home, report)
        )
        if as_json:
            found = {"machine": machine(), "tables": [each.record() for each in made]}
        else:
            print(machine(), flush=True)
            for each in made:
                print(f"\n{each.markdown()}", flush=True)
    if as_json:
        print(json.dumps(found, indent=1))


def _own(model: str, variants: list[str], device: str, rounds: int, report: Watch) -> Iterator[Any]:
    from . import own

    yield from own.tables(model, variants, device, rounds, report)


def _beside(
    names: list[str] | tuple[str, ...],
    rounds: int,
    pictures: int,
    load: float | None,
    home: Path | None,
    report: Watch,
) -> Iterator[Any]:
    """The tables of these names; `report` is told which is measured, and the share that is done."""
    try:
        import diffusers  # noqa: F401
        import openvino_genai  # noqa: F401
    except ImportError as error:
        raise MissingExtra("benchmarks beside other programs", "convert,dev") from error
    from edge_sd.caches import cache_folder

    from . import conversion, embedded, large, lora, profile, quality, together

    given, home = home, home or cache_folder("bench") / "sd15-random"
    for n, name in enumerate(names):
        report(f"measuring {name}", n / len(names))
        if name == "embedded":
            yield embedded.table(embedded.measure(rounds))
        elif name == "together":
            yield together.table(rounds)
        elif name == "serving":
            from . import serving

            yield serving.table(rounds, load)
        elif name == "determinism":
            from . import determinism

            yield determinism.table()
        elif name == "quality":
            yield quality.table(quality.measure(pictures))
        elif name == "large":
            yield large.table(large.measure(home, rounds))
        elif name == "lora":
            yield lora.table(home)
        elif name == "coreai":
            from . import coreai

            yield coreai.pictures()
            yield from coreai.full_size()
        elif name in LONG:
            from . import transformers

            part = name.partition("-")[2]
            yield from transformers.tables(given, rounds, (part,) if part else transformers.PARTS)
        elif name == "profile":
            yield profile.table(home)
        else:
            yield conversion.beside_optimum(large.ready_source(home))
            yield conversion.table()
