"""`edge-sd bench`: this machine's own tables, in Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edge_sd.errors import InvalidRequest, MissingExtra, choices

TABLES = ("embedded", "quality", "large", "lora", "profile", "conversion")


def bench(
    tables: Annotated[
        list[str] | None, typer.Argument(help=f"Which tables: {', '.join(TABLES)}. Default: all.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each program; the table has their medians.")] = 3,
    pictures: Annotated[int, typer.Option(min=2, help="Pictures of the table of quality.")] = 64,
    home: Annotated[
        Path | None, typer.Option(help="Where the large random model (6 GB) is kept. Default: the cache.")
    ] = None,
) -> None:
    """Measure this machine: edge-sd beside openvino.genai, optimum-intel and diffusers, and what presets cost."""
    for name in tables or TABLES:
        if name not in TABLES:
            raise InvalidRequest(f"unknown table {name!r}; valid: {choices(TABLES)}")
    try:
        import diffusers  # noqa: F401
        import openvino_genai  # noqa: F401
    except ImportError as error:
        raise MissingExtra("benchmarks beside other programs", "convert,dev") from error
    from edge_sd.bundle import models_home

    from . import conversion, embedded, large, lora, profile, quality
    from .process import machine

    home = home or models_home().parent / "bench"
    print(machine(), flush=True)
    for name in tables or TABLES:
        print(flush=True)
        if name == "embedded":
            print(embedded.table(embedded.measure(rounds)))
        elif name == "quality":
            print(quality.table(quality.measure(pictures)))
        elif name == "large":
            print(large.table(large.measure(home, rounds)))
        elif name == "lora":
            print(lora.table(home))
        elif name == "profile":
            print(profile.table(home))
        else:
            print(conversion.beside_optimum(large.ready_source(home)), conversion.table(), sep="\n\n")
