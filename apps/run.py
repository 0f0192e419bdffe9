"""`edge-sd run ORG/NAME "a prompt"`: pull what this machine needs of a model, convert it if that must be, and draw."""

from __future__ import annotations

import platform
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_sd.errors import InvalidRequest, MissingExtra, choices

from .terminal import progress, say

if TYPE_CHECKING:
    from edge_sd.bundle.hub import Repository
    from edge_sd.bundle.repository import Selection, Wish
    from edge_sd.converters.form import Form
    from edge_sd.converters.recipes import QuantRecipe

# The forms that need the converters, or torch.
WEIGHTS = ("torch", "checkpoint")
# Options of `generate` that `run` sets itself.
OWN = ("--model",)


def run(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="ORG/NAME", help="A model on Hugging Face's hub.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Pull without asking.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit. Default: the main branch.")] = None,
    file: Annotated[str | None, typer.Option(help="Of several checkpoints, which.")] = None,
    form: Annotated[
        str | None, typer.Option(help="openvino, coreml, torch or checkpoint. Default: what this machine draws with.")
    ] = None,
    precision: Annotated[str, typer.Option(help="Of a conversion: fp16, int8, int4, …")] = "fp16",
) -> None:
    """Draw with a model of the hub: pull it, convert it if that must be, and next time just draw.

    After ORG/NAME come the prompt and any options of `edge-sd generate`.
    """
    words = list(context.args)
    generate = context.find_root().command.commands["generate"]  # type: ignore[attr-defined]
    # Report mistakes in the options before anything is pulled.
    with generate.make_context("generate", list(words)) as parsed:
        given = parsed.params
    if given.get("prompt") is None and given.get("from_") is None:
        raise InvalidRequest(f'there is no prompt: edge-sd run {name} "a red apple"')
    if taken := [option for option in OWN if option in words]:
        raise InvalidRequest(f"{taken[0]} is what ORG/NAME says here; use edge-sd generate with it")
    silent = bool(given.get("quiet") or given.get("as_json"))
    folder = prepared(name, revision, file, form, precision, yes, silent)
    generate.main([*words, "--model", str(folder)], prog_name="edge-sd generate", standalone_mode=False)


def prepared(
    name: str, revision: str | None, file: str | None, form: str | None, precision: str, yes: bool, silent: bool
) -> Path:  # fmt: skip
    """The folder of a model that this machine draws with: it is there, or it is pulled, and converted.

    Raises InvalidRequest (no such form, or nobody to ask), MissingExtra, or what pulling and converting raise.
    """
    from edge_sd.bundle import hub
    from edge_sd.bundle.library import find_pulled, hub_folder
    from edge_sd.bundle.pulled import recorded
    from edge_sd.bundle.repository import FORMS, select

    if not hub.NAME.fullmatch(name):
        raise InvalidRequest(f"{name!r} is no model of the hub; they are called ORG/NAME")
    if form is not None and form not in FORMS:
        raise InvalidRequest(f"form {form!r} is unknown; valid: {choices(FORMS)}")
    there = find_pulled(name)
    kind = recorded(there).get("form", "torch") if there is not None else ""
    asked = revision is not None or file is not None or form not in (None, kind)
    if there is None or asked:
        from .models import hush_hub

        hush_hub(bars=not silent and sys.stderr.isatty())
        repository = hub.look(name, revision)
        selection = select(name, repository.files, wish_of(sys.platform, platform.machine(), file, form))
        if selection.form in WEIGHTS and not (can_convert() or (selection.form == "torch" and find_spec("torch"))):
            raise MissingExtra(f"{name} has torch weights, and drawing with them{_elsewhere(name)}", "convert")
        if not hub.is_whole(hub_folder(name), repository.revision, selection.files):
            _confirm(repository, selection, yes)
        there, kind = hub.take(repository, selection), selection.form
    if kind not in WEIGHTS or (kind == "torch" and not can_convert()):
        return there
    return converted(name, there, precision, silent)


def wish_of(system: str, processor: str, file: str | None, form: str | None) -> Wish:
    """What this machine takes of a repository: graphs that it runs before weights that it would convert.

    `system` is sys.platform's, `processor` platform.machine()'s word.
    """
    from edge_sd.bundle.repository import Wish

    forms: tuple[str, ...] = ("openvino", *WEIGHTS)
    layouts: tuple[str, ...] = ("split_einsum", "original")
    if system == "darwin":
        forms = ("coreml", *forms) if find_spec("openvino") else ("coreml", *WEIGHTS)
        if processor != "arm64":
            # No Neural Engine.
            layouts = layouts[::-1]
    # float16 is what converting stores by default, and half of what is pulled.
    return Wish(
        forms=forms if form is None else (form,), half=True, file=file, layouts=layouts,
        compiled=True if system == "darwin" else None,
    )  # fmt: skip


def can_convert() -> bool:
    """Whether the libraries of the `convert` extra are installed."""
    return all(find_spec(each) for each in ("torch", "diffusers", "transformers", "nncf", "safetensors"))


def converted(name: str, weights: Path, precision: str, silent: bool) -> Path:
    """The bundle that was made of a pull; it is made, or made anew where the pull is of another revision.

    Until the new one is whole, the one of the other revision stays. Raises what converting raises.
    """
    from edge_sd.bundle.library import converted_folder
    from edge_sd.converters.build import variant_name
    from edge_sd.converters.recipes import recipe_named
    from edge_sd.converters.targets import form_named
    from edge_sd.errors import ConversionError
    from edge_sd.files import aside, locked

    form = form_named("coreml" if sys.platform == "darwin" and not find_spec("openvino") else "openvino")
    recipe = recipe_named(precision, form.recipes)
    bundle, variant = converted_folder(name), variant_name(form, recipe)
    if _has(bundle, weights, variant) and not (_next(bundle).exists() or aside(bundle).exists()):
        return bundle
    try:
        bundle.parent.mkdir(parents=True, exist_ok=True)
        # Another process may be making it.
        with locked(bundle):
            _clear(bundle, weights)
            if not _has(bundle, weights, variant):
                if not silent:
                    say(f"converting {name} to {variant}, once", error=True)
                _convert(weights, bundle, form, recipe, silent)
    except OSError as error:
        raise ConversionError(f"{bundle}: {error.strerror or error}; nothing was added") from error
    return bundle


def _next(bundle: Path) -> Path:
    """Where the successor of a bundle is made, or what is left of the bundle that it replaced."""
    return bundle.with_name(f".{bundle.name}.partial")


def _is_of(bundle: Path, weights: Path) -> bool:
    """Whether a bundle was made of this very pull."""
    from edge_sd.bundle.library import MANIFEST
    from edge_sd.bundle.pulled import recorded

    return (bundle / MANIFEST).is_file() and recorded(bundle).get("revision") == recorded(weights).get("revision")


def _has(bundle: Path, weights: Path, variant: str) -> bool:
    from edge_sd.bundle.bundle import read_manifest

    # The name of one that was made of quantized weights says so at its end.
    return _is_of(bundle, weights) and variant in {name.split("_from-")[0] for name in read_manifest(bundle).variants}


def _clear(bundle: Path, weights: Path) -> None:
    """Finish what a killed process began; half a conversion of these weights stays, to go on from. Raises OSError."""
    from edge_sd.bundle.library import MANIFEST
    from edge_sd.files import exchange, recover, remove

    recover(bundle)
    made = _next(bundle)
    if _is_of(bundle, weights):
        remove(made)
    elif _is_of(made, weights):
        exchange(made, bundle)
    elif (made / MANIFEST).is_file():
        # Of another revision, or not recorded yet.
        remove(made)


def _convert(weights: Path, bundle: Path, form: Form, recipe: QuantRecipe, silent: bool) -> None:
    """Add a variant to the bundle of these weights, or make it, and put it in the place of an older one."""
    from edge_sd.bundle.library import HUB_RECORD
    from edge_sd.converters.build import build
    from edge_sd.converters.sources.checkpoint import unpacked
    from edge_sd.files import exchange, write_atomically

    from .libraries import hush_libraries

    place = bundle if _is_of(bundle, weights) else _next(bundle)
    hush_libraries()
    with progress(silent, "reading") as report, unpacked(weights, bundle) as folder:
        build(folder, place, form, recipe, report)
    if place != bundle:
        if (weights / HUB_RECORD).is_file():
            write_atomically(place / HUB_RECORD, (weights / HUB_RECORD).read_bytes())
        exchange(place, bundle)


def _elsewhere(name: str) -> str:
    """Where the same weights lie in a form that needs no conversion, as an aside."""
    from edge_sd.bundle.catalogue import known

    entry = known(name)
    return "" if entry is None or entry.openvino is None else f" (or edge-sd run {entry.openvino}, an export of them,)"


def _confirm(repository: Repository, selection: Selection, yes: bool) -> None:
    """Say what would be pulled, and ask once. Raises InvalidRequest where nobody can answer, typer.Abort for a no."""
    after = ", then converted" if selection.form in WEIGHTS and can_convert() else ""
    what = f"{repository.name}: {selection.size / 1e9:.2f} GB ({selection.form}{after}), licence {repository.license}"
    if yes:
        say(what, error=True)
        return
    if not sys.stdin.isatty():
        raise InvalidRequest(f"{what}: nobody is here to ask; say --yes to pull it")
    typer.confirm(f"{what}. Pull it?", default=True, abort=True, err=True)
