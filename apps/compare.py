"""`edge-sd compare`: figures and pictures side by side."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from edge_sd.errors import InvalidRequest

app = typer.Typer(help="Figures and pictures side by side.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Figures and pictures side by side."""


@app.command("autoencoder")
def autoencoder(
    model: Annotated[str, typer.Argument(help="A model's name or folder, with its torch weights.")] = "emoji",
    work: Annotated[Path, typer.Option(help="The folder that holds the artwork (edge-sd train data).")] = Path(
        "training-work"
    ),
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the sheet of pictures goes.")] = Path(
        "autoencoder.png"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")] = False,
) -> None:
    """The learned code beside PCA with as many numbers per picture, on pictures that neither has seen."""
    from .train import training_libraries

    if output.suffix.lower() != ".png" or not output.absolute().parent.is_dir():
        raise InvalidRequest(f"{output} is no PNG file in a folder that exists")
    with training_libraries():
        from edge_sd.bundle import find_model
        from edge_sd.converters.training import codes

        rows = codes.compare(find_model(model), work, output)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    print("| 1,024 numbers per picture | held-out pictures | noisy ones, against the clean |\n| --- | --- | --- |")
    for name, row in rows.items():
        kept = "" if row["picture"] != row["picture"] else f"{row['picture']:.1f} dB"
        print(f"| {name} | {kept} | {row['noisy']:.1f} dB |")
    print(f"{output}: pictures, {', '.join(list(rows)[1:])}; noisy, cleaned; grey and coloured", file=sys.stderr)
