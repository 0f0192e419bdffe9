"""`edge-sd models list`, `pull`, `show` and `verify`: the models on this machine."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated

import typer

from . import completion
from .options import AsJson, Quiet
from .terminal import say, say_json, wrapped

Model = Annotated[str, typer.Argument(help="A name or a folder.", autocompletion=completion.models)]
app = typer.Typer(no_args_is_help=True, help="The models on this machine.")


def hush_hub(bars: bool) -> None:
    """Keep the hub library's advice out of our output, and its bars too unless they are wanted."""
    with contextlib.suppress(ImportError):
        from huggingface_hub.utils import logging
        from huggingface_hub.utils.tqdm import disable_progress_bars

        logging.get_logger().setLevel("CRITICAL")
        if not bars:
            disable_progress_bars()


@app.command("list")
def list_models(as_json: AsJson = False) -> None:
    """Every model that can be used by name."""
    from edge_sd.bundle.bundle import open_foreign, read_manifest
    from edge_sd.bundle.library import MANIFEST, installed_models, pulled_models, unreadable
    from edge_sd.errors import ModelError

    rows, problems = [], [unreadable()]
    folders = {**installed_models(), **pulled_models()}
    for name, folder in folders.items():
        try:
            # A single checkpoint has to be converted first.
            bundle = read_manifest(folder) if (folder / MANIFEST).is_file() else open_foreign(folder)
        except ModelError as error:
            if (folder / MANIFEST).is_file():
                problems.append(f"{name}: {error}")
            continue
        rows.append({"name": name, "folder": str(bundle.root), "family": bundle.facts.family,
                     "license": bundle.facts.license, "variants": sorted(bundle.variants)})  # fmt: skip
    for problem in filter(None, problems):
        say(f"note: {problem}", error=True)
    if as_json:
        say_json(rows)
        return
    for row in rows:
        say(f"{row['name']}  {', '.join(row['variants'])}  ({row['license']})")


@app.command("pull")
def pull(
    name: Annotated[str, typer.Argument(metavar="ORG/NAME", help="A model on Hugging Face's hub.")],
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit. Default: the main branch.")] = None,
    half: Annotated[bool, typer.Option("--half", help="Weights in float16 where there are both: half the bytes.")] = (
        False
    ),
    file: Annotated[str | None, typer.Option(help="Of several checkpoints, which.")] = None,
    form: Annotated[
        str | None,
        typer.Option(help="Of several forms, which: torch, openvino, checkpoint or coreml, in this order."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Download a model at an exact revision: safetensors or graphs, never pickles. One that was stopped goes on."""
    from edge_sd.bundle import hub
    from edge_sd.bundle.pulled import recorded
    from edge_sd.bundle.repository import FORMS
    from edge_sd.errors import InvalidRequest, choices

    if form is not None and form not in FORMS:
        raise InvalidRequest(f"form {form!r} is unknown; valid: {choices(FORMS)}")
    hush_hub(bars=not quiet and sys.stderr.isatty())
    folder = hub.pull(name, revision, half=half, file=file, forms=FORMS if form is None else (form,))
    if not quiet:
        found = recorded(folder)
        total = sum(row["bytes"] for row in found["files"].values())
        say(f"{name} at {found['revision']}: {len(found['files'])} files, {total / 1e6:.1f} MB", error=True)
        say(f"next: {next_command(name, found.get('form', 'torch'))}", error=True)
    say(folder)


def next_command(name: str, form: str) -> str:
    """What a person does with a model that was pulled: draw with it, or convert it first."""
    from importlib.util import find_spec

    if form == "checkpoint" or (form == "torch" and find_spec("torch") is None):
        return f"edge-sd convert {name} {name.split('/')[1].lower()}"
    return f'edge-sd generate "a red apple" --model {name}'


@app.command("catalogue")
def catalogue(as_json: AsJson = False) -> None:
    """Repositories of the hub with models of these families, and where that is said. None of them was tried."""
    from dataclasses import asdict

    from edge_sd.bundle.catalogue import CATALOGUE

    if as_json:
        say_json([asdict(each) for each in CATALOGUE])
        return
    for each in CATALOGUE:
        defaults = ", ".join(f"{name} {value}" for name, value in each.defaults.items() if name != "height")
        print(f"{each.name}\n  {each.family}, {each.form}, {each.gigabytes:g} GB, {each.license}; {each.source}")
        if defaults:
            print(f"  {defaults}")
        print(f"  read where it is said: {', '.join(each.checked) or 'nothing; from memory'}")


@app.command("show")
def show(model: Model, as_json: AsJson = False) -> None:
    """What a model is, what each variant of it weighs and measured, and the words that a small one knows."""
    from dataclasses import asdict

    from edge_sd.bundle.bundle import ModelBundle
    from edge_sd.text.known_words import KnownWords

    bundle = ModelBundle.open(model)
    words = KnownWords.read(bundle.root)
    if as_json:
        variants = {name: {**asdict(v), "bytes": v.size()} for name, v in bundle.variants.items()}
        known = {} if words is None else {name: getattr(words, name) for name in ("concepts", "styles", "backgrounds")}
        say_json({"folder": str(bundle.root), **asdict(bundle.facts), "variants": variants, **known})
        return
    defaults = bundle.defaults
    say(f"{bundle.name}: {bundle.facts.family}, {bundle.facts.schedule.prediction_type}, {bundle.facts.license}")
    say(f"folder    {bundle.root}")
    say(
        f"defaults  {defaults.width}x{defaults.height}, {defaults.steps} steps, guidance {defaults.guidance:g}, "
        f"sampler {defaults.sampler}"
    )
    for name, variant in sorted(bundle.variants.items()):
        say(f"{name}  {variant.size() / 1e6:.1f} MB")
        for part, artifact in variant.artifacts.items():
            measured = f"{artifact.parity.psnr:.1f} dB against torch float32" if artifact.parity else "not measured"
            origin = artifact.quantized and f", from {artifact.quantized}"
            say(f"  {part:15} {measured}{origin}")
    if words is not None:
        for name in ("styles", "backgrounds", "concepts"):
            row = getattr(words, name)
            say(f"knows {len(row)} {name}")
            say(wrapped(", ".join(row)))
        say(f"and {len(words.known)} words in all: kinds and other names of these, and words of its captions")


@app.command("verify")
def verify(model: Model, as_json: AsJson = False) -> None:
    """Hash every file of a model and compare with its manifest; exit code 1 if any differs.

    Another program's export has no hashes: those of the first time are compared from then on.
    """
    from edge_sd.bundle.bundle import ModelBundle
    from edge_sd.bundle.seen import Seen

    bundle = ModelBundle.open(model)
    problems = bundle.verify()
    unhashed = bundle.unhashed()
    seen = Seen.of(bundle.root) if unhashed else None
    problems += seen.problems(unhashed) if seen is not None else []
    named = {*bundle.files, *bundle.others, *(name for each in bundle.variants.values() for name in each.files)}
    known = len(named) - len(unhashed)
    new = seen.remember(unhashed) if seen is not None and not problems else []
    counts = {"named": known, "verified_before": len(unhashed) - len(new), "recorded_now": len(new)}
    if as_json:
        say_json({"model": bundle.name, "problems": problems, "files": {} if problems else counts})
    for problem in problems if not as_json else ():
        say(problem)
    if problems:
        raise typer.Exit(1)
    if as_json:
        return
    if known:
        say(f"{bundle.name}: {known} files as the manifest says")
    if len(unhashed) > len(new):
        say(f"{bundle.name}: {len(unhashed) - len(new)} files as they were when they were first verified")
    if new:
        say(f"{bundle.name}: nothing can be said of {len(new)} files, since nothing has recorded their hashes; "
              "they are recorded now")  # fmt: skip
