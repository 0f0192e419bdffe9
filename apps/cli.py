"""The command `edge-sd`. Only this file sees parsed arguments; what it calls takes named values.

Pictures' paths go to stdout and everything else to stderr, so that `open "$(edge-sd generate …)"` works.
Mistakes are one line and exit with 2. Nothing heavy is imported before it is needed: --help answers at once.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge_sd import __version__
from edge_sd.errors import EdgeSDError, InvalidRequest

from . import machine, train
from .compare import commands as compare
from .macos import commands as macos

if TYPE_CHECKING:
    from edge_sd.request import Request, Result
    from edge_sd.samplers import Step

app = typer.Typer(
    name="edge-sd",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help='Stable Diffusion on the machine in front of you. Without any download: edge-sd generate "a red apple"',
)
models = typer.Typer(no_args_is_help=True, help="The models on this machine.")
app.add_typer(models, name="models")
app.add_typer(train.app, name="train")
app.add_typer(compare.app, name="compare")
app.add_typer(macos.app, name="macos")
for command in (machine.devices, machine.tune, machine.doctor):
    app.command()(command)

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


def main() -> None:
    """Run the command line; turn every error a user can cause into one line and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except EdgeSDError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("stopped; nothing more was written", 130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
    except Exception as error:
        # The parser's own errors know how to say themselves; typer keeps their class private.
        if hasattr(error, "format_message"):
            _fail(error.format_message())
        if type(error).__name__ == "Abort":
            _fail("stopped; nothing more was written", 130)
        raise
    if code == 130:
        # The parser answers Ctrl-C with this code and not a word.
        _fail("stopped; nothing more was written", 130)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int = 2) -> None:
    line = " ".join(message.split()).encode("utf-8", "backslashreplace").decode()
    print(f"edge-sd: {line}", file=sys.stderr)
    sys.exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"edge-sd {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = (
        False
    ),
) -> None: ...


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    negative: Annotated[str, typer.Option(help="What to lead away from.")] = "",
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="How strongly to follow the prompt; 1 is not at all.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed makes the same picture. Default: random.")] = None,
    size: Annotated[str | None, typer.Option(metavar="N|WxH", help="Pixels, multiples of 8.")] = None,
    sampler: Annotated[str | None, typer.Option(help="euler, euler_a, dpmpp_2m, ddim, lcm, pndm, …")] = None,
    count: Annotated[int, typer.Option(help="Pictures, at seed, seed + 1, …")] = 1,
    image: Annotated[Path | None, typer.Option(help="A picture to start from.")] = None,
    strength: Annotated[float | None, typer.Option(help="How much of the image is drawn anew, up to 1.")] = None,
    mask: Annotated[Path | None, typer.Option(help="White where the image is drawn anew; the rest stays.")] = None,
    mask_blur: Annotated[float | None, typer.Option(help="Pixels over which the two are blended.")] = None,
    control: Annotated[Path | None, typer.Option(help="A sketch or picture whose lines are followed.")] = None,
    control_weight: Annotated[float, typer.Option(help="How closely, 0 to 2.")] = 1.0,
    control_start: Annotated[float, typer.Option(help="From this share of the steps …")] = 0.0,
    control_end: Annotated[float, typer.Option(help="… to this one.")] = 1.0,
    control_reading: Annotated[str, typer.Option(help="auto, canny, scribble (dark on light), lines.")] = "auto",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A .png, .jpg or .webp file.")] = None,
    model: Annotated[str, typer.Option(help="A name (edge-sd models list) or a folder.")] = "emoji",
    variant: Annotated[str | None, typer.Option(help="A variant of the model (edge-sd models show).")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, gpu, npu, ane, coreml-reference, …")] = "auto",
    prefer: machine.Prefer = "speed",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say what runs where, and what not and why.")] = (
        False
    ),
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Draw a picture."""
    from edge_sd.image_io import check_output
    from edge_sd.pipeline import Pipeline
    from edge_sd.request import Request

    width, height = parse_size(size)
    request = Request(
        prompt, negative, width, height, steps, guidance, seed, sampler, count, image, strength, mask, mask_blur,
        control, control_weight, control_start, control_end, control_reading,
    )  # fmt: skip
    path = output if output is not None else free_name(prompt)
    check_output(path)
    silent = quiet or as_json

    def tell(line: str) -> None:
        if not silent:
            print(line, file=sys.stderr)

    with Pipeline.open(model, device, variant, prefer, tell) as pipeline:
        pipeline.resolve(request)  # A mistake is told before anything else is.
        tell(pipeline.plan.explain() if verbose else pipeline.plan.summary())
        with _progress(request, silent) as on_step:
            result = pipeline.generate(request, on_step)
    paths = result.save(path)
    if as_json:
        print(json.dumps(_report(result, paths), indent=2))
    elif not quiet:
        for note in result.notes:
            print(f"note: {note}", file=sys.stderr)
        for written in paths:
            print(written)


def parse_size(size: str | None) -> tuple[int | None, int | None]:
    """Width and height of "512" or "512x768". Raises InvalidRequest."""
    if size is None:
        return None, None
    match = re.fullmatch(r"(\d{1,6})(?:[xX×](\d{1,6}))?", size.strip())
    if match is None:
        raise InvalidRequest(f"size {size!r} is neither a number nor WIDTHxHEIGHT, such as 512 or 512x768")
    return int(match[1]), int(match[2] or match[1])


def free_name(prompt: str, folder: Path = Path()) -> Path:
    """A name made of the prompt that no file in `folder` has yet."""
    stem = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].rstrip("-") or "picture"
    path, n = folder / f"{stem}.png", 1
    while path.exists() or path.with_stem(f"{path.stem}-1").exists():
        n += 1
        path = folder / f"{stem}-{n}.png"
    return path


@contextmanager
def _progress(request: Request, silent: bool) -> Iterator[Any]:
    """A bar over all steps of all pictures; yields the callback for Pipeline.generate."""
    if silent:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("loading", total=None)

        def on_step(n: int, step: Step) -> None:
            what = "drawing" if request.count == 1 else f"drawing {n + 1} of {request.count}"
            bar.update(
                task, description=what, total=request.count * step.total, completed=n * step.total + step.index + 1
            )

        yield on_step


def _report(result: Result, paths: list[Path]) -> dict[str, Any]:
    from dataclasses import asdict

    pictures = [
        {"path": str(path), **asdict(picture.settings), "model": picture.model, "model_hash": picture.model_hash,
         "variant": picture.variant, "device": picture.device}
        for path, picture in zip(paths, result.pictures, strict=True)
    ]  # fmt: skip
    return {"pictures": pictures, "plan": result.plan, "seconds": result.seconds, "notes": result.notes}


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A diffusers folder with safetensors, or an installed model.")],
    bundle: Annotated[Path, typer.Argument(help="The bundle to make, or to add the variant to.")],
    to: Annotated[str, typer.Option(help="openvino, coreml")] = "openvino",
    precision: Annotated[
        str, typer.Option(help="How weights are stored: fp32, fp16, int8, int4; Core ML: fp16, int8, p8, p6, p4, …")
    ] = "fp16",
    compute: Annotated[str | None, typer.Option(help="Core ML: ane (Neural Engine) or gpu.")] = None,
    size: Annotated[str | None, typer.Option(metavar="N|WxH", help="Core ML: pixels, fixed. Default: the model's.")] = (
        None
    ),
    target: Annotated[str | None, typer.Option(help="Core ML: the oldest system to run on, iOS16 or macOS13 …")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Convert a model's weights, measure them against torch, and add them to a bundle."""
    from edge_sd.converters.build import build, require_extra, variant_name
    from edge_sd.converters.forms import form_named
    from edge_sd.converters.recipes import recipe_named

    width, height = parse_size(size)
    form = form_named(to, compute=compute, target=target, width=width, height=height)
    recipe = recipe_named(precision, form.recipes)
    require_extra()
    hush_libraries()
    with _conversion_progress(quiet or as_json) as report:
        made = build(source, bundle, form, recipe, report)
    name = variant_name(form, recipe)
    variant = made.variant(name)
    rows = {
        part: {"psnr": artifact.parity.psnr, "max_error": artifact.parity.max_error}
        for part, artifact in variant.artifacts.items()
        if artifact.parity
    }
    if as_json:
        print(json.dumps({"bundle": str(bundle), "variant": name, "bytes": variant.size(), "parity": rows}, indent=2))
    elif not quiet:
        for part, row in rows.items():
            print(f"{part:13} {row['psnr']:6.1f} dB against torch float32", file=sys.stderr)
        print(f"{name}: {variant.size() / 1e6:.1f} MB", file=sys.stderr)
        print(bundle)


@contextmanager
def _conversion_progress(silent: bool) -> Iterator[Any]:
    if silent:
        yield lambda what, share: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=1.0)
        yield lambda what, share: bar.update(task, description=what, completed=share)


def hush_libraries() -> None:
    """Keep other libraries' bars and advice out of our output; their errors still come as exceptions."""
    import logging
    import os
    import warnings

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


@models.command("list")
def models_list(as_json: AsJson = False) -> None:
    """Every model that can be used by name."""
    from edge_sd.bundle import installed_models, read_manifest

    rows = []
    for name, folder in installed_models().items():
        bundle = read_manifest(folder)
        rows.append({"name": name, "folder": str(folder), "family": bundle.facts.family,
                     "license": bundle.facts.license, "variants": sorted(bundle.variants)})  # fmt: skip
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print(f"{row['name']}  {', '.join(row['variants'])}  ({row['license']})")


@models.command("show")
def models_show(model: Annotated[str, typer.Argument(help="A name or a folder.")], as_json: AsJson = False) -> None:
    """What a model is, and what each variant of it weighs and measured."""
    from dataclasses import asdict

    from edge_sd.bundle import ModelBundle

    bundle = ModelBundle.open(model)
    if as_json:
        variants = {name: {**asdict(v), "bytes": v.size()} for name, v in bundle.variants.items()}
        print(json.dumps({"folder": str(bundle.root), **asdict(bundle.facts), "variants": variants}, indent=2))
        return
    defaults = bundle.defaults
    print(f"{bundle.name}: {bundle.facts.family}, {bundle.facts.schedule.prediction_type}, {bundle.facts.license}")
    print(f"folder    {bundle.root}")
    print(
        f"defaults  {defaults.width}x{defaults.height}, {defaults.steps} steps, guidance {defaults.guidance:g}, "
        f"sampler {defaults.sampler}"
    )
    for name, variant in sorted(bundle.variants.items()):
        print(f"{name}  {variant.size() / 1e6:.1f} MB")
        for part, artifact in variant.artifacts.items():
            measured = f"{artifact.parity.psnr:.1f} dB against torch float32" if artifact.parity else "not measured"
            print(f"  {part:13} {measured}")


@models.command("verify")
def models_verify(model: Annotated[str, typer.Argument(help="A name or a folder.")]) -> None:
    """Hash every file of a model and compare with its manifest; exit code 1 if any differs."""
    from edge_sd.bundle import ModelBundle

    bundle = ModelBundle.open(model)
    problems = bundle.verify()
    for problem in problems:
        print(problem)
    if problems:
        raise typer.Exit(1)
    count = len(bundle.files) + sum(len(variant.files) for variant in bundle.variants.values())
    print(f"{bundle.name}: {count} files as the manifest says")
