"""`edge-sd compare`: figures and pictures side by side."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from edge_sd.errors import InvalidRequest, choices

from ..options import Quiet
from ..terminal import progress, say, say_json


class _ModelOrCommand(TyperGroup):
    """`compare MODEL …` is `compare run MODEL …`: the first word is a command only where it is one's name."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] != "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_ModelOrCommand,
    help="The variants of a model side by side. `compare MODEL …` is short for `compare run MODEL …`.",
)

Folder = Annotated[Path, typer.Option("--report", help="The folder of the report; run again, it goes on there.")]
Reference = Annotated[str | None, typer.Option(help="torch-fp32 or a variant. Default: the most exact one to be had.")]
Weights = Annotated[Path | None, typer.Option(help="The diffusers folder of torch-fp32, where it is not found.")]
Prompts = Annotated[Path | None, typer.Option(help="A file with one prompt a line.")]
Seed = Annotated[int, typer.Option(help="The first seed.")]
Seeds = Annotated[int, typer.Option(min=1, max=1000, help="Pictures of each prompt.")]
Rounds = Annotated[int, typer.Option(min=0, max=100, help="Fresh processes in which each variant is timed.")]
Swap = Annotated[int, typer.Option(min=0, help="Pictures with one component swapped at a time; 0 is none.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps. Default: each variant's own.")]
Guidance = Annotated[float | None, typer.Option(help="Scale of guidance. Default: each variant's own.")]
Size = Annotated[str | None, typer.Option(metavar="N|WxH", help="Pixels. Default: the model's.")]
Sampler = Annotated[str | None, typer.Option(help="One sampler for all. Default: each variant's own.")]
MinPsnr = Annotated[float, typer.Option(help="The recommendation: image PSNR in dB, at least.")]
MaxSize = Annotated[float | None, typer.Option(help="The recommendation: MB on disk, at most.")]
FailUnder = Annotated[
    list[str] | None,
    typer.Option(metavar="METRIC=X", help="Exit with 1 if a variant's mean is below: psnr=30,ssim=0.9"),
]
Device = Annotated[str, typer.Option(help="Where variants run that name no device of their own.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of a table.")]
FOLDER = Path("comparison")


@app.command("run")
def run(
    model: Annotated[str, typer.Argument(help="A name (edge-sd models list) or a folder.")] = "emoji",
    variants: Annotated[
        str | None, typer.Option(metavar="NAME,NAME@DEVICE", help="Which, and where. Default: all that run here.")
    ] = None,
    reference: Reference = None,
    weights: Weights = None,
    prompts: Prompts = None,
    seed: Seed = 0,
    seeds: Seeds = 1,
    rounds: Rounds = 3,
    swap: Swap = 4,
    steps: Steps = None,
    guidance: Guidance = None,
    size: Size = None,
    sampler: Sampler = None,
    device: Device = "auto",
    folder: Folder = FOLDER,
    min_psnr: MinPsnr = 30.0,
    max_size: MaxSize = None,
    fail_under: FailUnder = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Draw the same pictures with every variant, measure all of them, and write a report."""
    from edge_sd.bundle.bundle import ModelBundle

    _compare(
        ModelBundle.open(model), {}, folder, rounds, min_psnr, max_size, fail_under, as_json, quiet,
        variants=_names(variants), reference=reference, weights=weights, prompts=prompts, seed=seed, seeds=seeds,
        swapped=swap, device=device, wishes=_wishes(steps, guidance, size, sampler),
    )  # fmt: skip


@app.command("sweep")
def sweep(
    model: Annotated[str, typer.Argument(help="A diffusers folder with safetensors, or an installed model.")],
    to: Annotated[str, typer.Option(help="openvino, coreml, coreai")] = "openvino",
    bits: Annotated[str | None, typer.Option(metavar="N,N", help="Of 32, 16, 8, 6, 4, 2, 1. Default: all.")] = None,
    group_size: Annotated[str | None, typer.Option(metavar="N,N", help="Where weights have groups.")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME",
            help="float, weights (w8, w4), palette; and by name only: w8a8, hybrid, "
            "scale, awq, gptq, lowrank, nf4, fp8.",
        ),
    ] = None,
    compute: Annotated[str | None, typer.Option(help="Core ML: ane or gpu.")] = None,
    reference: Reference = None,
    prompts: Prompts = None,
    seed: Seed = 0,
    seeds: Seeds = 1,
    rounds: Rounds = 3,
    swap: Swap = 4,
    steps: Steps = None,
    guidance: Guidance = None,
    folder: Folder = Path("sweep"),
    min_psnr: MinPsnr = 30.0,
    max_size: MaxSize = None,
    fail_under: FailUnder = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Convert a model in every precision that was asked for, into REPORT/bundle, and compare what came out."""
    from edge_sd.bundle.library import find_model

    from .sweep import Sweep, make

    wishes = _wishes(steps, guidance, None, None)
    wanted = Sweep.parse(to, bits, group_size, method, compute)
    _check(folder, prompts, fail_under)
    with progress(quiet or as_json, "planning") as report:
        bundle, failed = make(model, folder, wanted, report)
    _compare(
        bundle, failed, folder, rounds, min_psnr, max_size, fail_under, as_json, quiet,
        variants=sorted(bundle.variants), reference=reference, weights=find_model(model, weights=True), prompts=prompts,
        seed=seed, seeds=seeds, swapped=swap, device="auto", wishes=wishes,
    )  # fmt: skip


@app.command("suggest")
def suggest(
    model: Annotated[str, typer.Argument(help="A bundle with two variants or more of one form.")],
    max_size: Annotated[str | None, typer.Option(metavar="500MB", help="Bytes on disk, at most.")] = None,
    min_psnr: Annotated[float | None, typer.Option(min=0, max=100, help="Image PSNR in dB, at least.")] = None,
    variants: Annotated[
        str | None, typer.Option(metavar="NAME,NAME", help="Those that may give parts. Default: all of one form.")
    ] = None,
    reference: Reference = None,
    weights: Weights = None,
    prompts: Prompts = None,
    seed: Seed = 0,
    seeds: Seeds = 1,
    steps: Steps = None,
    guidance: Guidance = None,
    size: Size = None,
    folder: Folder = FOLDER,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Find which part of a model in which precision is best for a size, and add that variant to the bundle.

    Without a limit, all mixtures that no other beats are listed, and nothing is added.
    """
    from edge_sd.bundle.bundle import ModelBundle
    from edge_sd.paths import embedded_models

    from ..terminal import columns
    from . import suggest as mixing
    from .plan import plan, read_prompts

    limit = None if max_size is None else mixing.parse_bytes(max_size)
    adds = limit is not None or min_psnr is not None
    _check(folder, prompts, None)
    bundle = ModelBundle.open(model)
    if adds and bundle.root.is_relative_to(embedded_models()):
        raise InvalidRequest(f"{bundle.name} is the package's own; make a bundle: edge-sd compare sweep emoji")
    names = mixing.family(bundle, _names(variants))
    comparison = plan(
        bundle, variants=names, reference=reference, weights=weights, prompts=read_prompts(prompts) if prompts else (),
        seed=seed, seeds=seeds, swapped=0, wishes=_wishes(steps, guidance, size, None),
    )  # fmt: skip
    with progress(quiet or as_json, "planning") as report:
        found = mixing.search(comparison, names, folder, report)
        made = mixing.make(comparison, found, limit, min_psnr, folder, report) if adds else None
    rows = mixing.rows_of(bundle, found, made.name if made else "")
    if as_json:
        say_json({"reference": comparison.reference.name, "front": rows, "made": asdict(made) if made else None})
    elif not quiet:
        titles = ["variant", "MB", "PSNR, expected", *rows[0]["parts"]]
        lines = [[row["name"], f"{row['bytes'] / 1e6:.1f}", f"{row['psnr']:.1f} dB", *row["parts"].values()]
                 for row in rows]  # fmt: skip
        say("\n".join(columns(titles, lines)))
    if made and not as_json:
        say(f"{made.name}: {made.bytes / 1e6:.1f} MB, {made.psnr:.1f} dB measured, {made.expected:.1f} dB expected")


@app.command("show")
def show(
    folder: Annotated[Path, typer.Argument(help="The folder of a report.")],
    as_json: AsJson = False,
) -> None:
    """Print the table of a report."""
    from .report import read_report
    from .text import text

    report = read_report(folder)
    if as_json:
        say_json(report)
    else:
        say(text(report))


def _compare(
    bundle: Any,
    failed: dict[str, str],
    folder: Path,
    rounds: int,
    min_psnr: float,
    max_size: float | None,
    fail_under: list[str] | None,
    as_json: bool,
    quiet: bool,
    *,
    prompts: Path | None,
    **choice: Any,
) -> None:
    from .measure import measure
    from .plan import plan, read_prompts
    from .report import make_report, write_report
    from .text import text
    from .verdict import missed, parse_gates

    gates = parse_gates(fail_under or [])
    _check(folder, prompts, fail_under)
    comparison = plan(bundle, prompts=read_prompts(prompts) if prompts else (), **choice)
    with progress(quiet or as_json, "planning") as report:
        work = measure(comparison, folder, rounds, report)
    found = make_report(comparison, work, failed, folder, min_psnr, max_size)
    page = write_report(found, folder)
    if as_json:
        say_json(found)
    elif not quiet:
        say(text(found))
        say(page)
    if lines := missed(found["rows"], gates):
        for line in lines:
            say(f"edge-sd: gate missed: {line}", error=True)
        raise typer.Exit(1)


def _check(folder: Path, prompts: Path | None, fail_under: list[str] | None) -> None:
    """Report mistakes before anything is converted or drawn."""
    from .plan import read_prompts
    from .verdict import parse_gates

    parse_gates(fail_under or [])
    if prompts:
        read_prompts(prompts)
    if folder.exists() and not folder.is_dir():
        raise InvalidRequest(f"{folder} is a file; give a folder for the report")
    if not folder.absolute().parent.is_dir():
        raise InvalidRequest(f"the folder {str(folder.absolute().parent)!r}, where the report would go, does not exist")
    kept = ("report.json", "work", "bundle")
    if folder.is_dir() and any(folder.iterdir()) and not any((folder / name).exists() for name in kept):
        raise InvalidRequest(f"{folder} is neither empty nor a report; give a new folder")


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()] if text else []


def _wishes(steps: int | None, guidance: float | None, size: str | None, sampler: str | None) -> Any:
    from ..drawing import parse_size
    from .plan import Wishes

    width, height = parse_size(size)
    return Wishes(steps, guidance, sampler, width, height)


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
    from ..train import training_libraries

    if output.suffix.lower() != ".png" or not output.absolute().parent.is_dir():
        raise InvalidRequest(f"{output} is no PNG file in a folder that exists")
    with training_libraries():
        from edge_sd.bundle.library import find_model
        from edge_sd.converters.training import codes

        rows = codes.compare(find_model(model, weights=True), work, output)
    if as_json:
        say_json(rows)
        return
    print("| 1,024 numbers per picture | held-out pictures | noisy ones, against the clean |\n| --- | --- | --- |")
    for name, row in rows.items():
        kept = "" if row["picture"] != row["picture"] else f"{row['picture']:.1f} dB"
        print(f"| {name} | {kept} | {row['noisy']:.1f} dB |")
    say(f"{output}: pictures, {', '.join(list(rows)[1:])}; noisy, cleaned; grey and coloured", error=True)


@app.command("bits")
def bits(
    bundle: Annotated[Path, typer.Argument(help="A bundle with a variant of mixed bits (edge-sd convert).")],
    variant: Annotated[str, typer.Option(help="Which variant.")] = "coreml-ane-mixed",
    component: Annotated[str, typer.Option(help="Which component, by the name of its package.")] = "Unet",
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the figure goes.")] = Path("bits.png"),
) -> None:
    """Size and PSNR of palettes of one width, and of the mixtures that a sensitivity analysis found."""
    from edge_sd.bundle.bundle import ModelBundle
    from edge_sd.converters.build import require_extra

    require_extra()
    from edge_sd.converters.coreml.mixed import BitRecipe, draw, table

    if output.suffix.lower() != ".png" or not output.absolute().parent.is_dir():
        raise InvalidRequest(f"{output} is no PNG file in a folder that exists")
    opened = ModelBundle.open(bundle)
    opened.variant(variant)
    recipes = {path.name.split(".")[0]: path for path in sorted((opened.root / variant).glob("*.bits.json"))}
    if component not in recipes:
        raise InvalidRequest(f"{variant} has no bits of {component!r}; valid: {choices(recipes)}")
    recipe = BitRecipe.open(recipes[component])
    draw(recipe, output)
    print(table(recipe))
    say(f"{output}: the same, drawn", error=True)
