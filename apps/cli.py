"""The command `edge-sd`. Commands stand here and in files of apps/ named after them; below apps/ nothing sees parsed
arguments.

Pictures' paths go to stdout and everything else to stderr, so that `open "$(edge-sd generate …)"` works.
Mistakes are one line and exit with 2. Nothing heavy is imported before it is needed: --help answers at once.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from edge_sd import __version__
from edge_sd.errors import EdgeSDError, InvalidRequest

from . import cache, completion, machine, models, pictures, streams, train
from .batch import commands as batches
from .batch.place import Place
from .bench.commands import bench
from .compare import commands as compare
from .desktop.commands import desktop
from .drawing import deliver, parse_device, parse_size, step_progress
from .exit_codes import SHORT
from .help_examples import epilog
from .libraries import hush_libraries
from .macos import commands as macos
from .manual import manual
from .mcp.commands import mcp
from .options import AsJson, Overwrite, Quiet
from .request_options import fields_of, takes_request
from .run import run
from .saving import Saver
from .server.commands import serve
from .terminal import messages, progress, say, say_json
from .upscale import upscale

if TYPE_CHECKING:
    from edge_sd.bundle.bundle import ModelBundle
    from edge_sd.pipeline.recorded import Recorded
    from edge_sd.pipeline.request import Request


class Commands(TyperGroup):
    """The commands; what breaks a pipe inside them is said by `main`."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise streams.BrokenPipe from error


app = typer.Typer(
    name="edge-sd",
    cls=Commands,
    invoke_without_command=True,
    epilog=SHORT,
    pretty_exceptions_enable=False,
    help='Stable Diffusion on the machine in front of you. Without any download: edge-sd generate "a red apple"',
)


def main() -> None:
    """Run the command line; turn every error a user can cause into one line and exit code 2."""
    streams.tolerate_encodings()
    arguments = sys.argv[1:]
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    try:
        code = app(arguments, prog_name="edge-sd", standalone_mode=False)
        sys.stdout.flush()
    except EdgeSDError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _stopped()
    except (BrokenPipeError, streams.BrokenPipe):
        if not streams.reader_is_gone():
            _fail("a connection to another program broke off")
        streams.give_up_stdout()
        sys.exit(141)
    except OSError as error:
        streams.give_up_stdout()
        _fail(streams.reason(error))
    except Exception as error:
        # The parser's own errors know how to say themselves; typer keeps their class private.
        if hasattr(error, "format_message"):
            _fail(error.format_message())
        if type(error).__name__ == "Abort":
            _stopped()
        raise
    if code == 130:
        # The parser answers Ctrl-C with this code and not a word.
        _stopped()
    sys.exit(code if isinstance(code, int) else 0)


def _stopped() -> None:
    # The process still waits for the device's last call; who presses Ctrl-C again does not want to.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _fail("stopped; nothing more was written", 130)


def _fail(message: str, code: int = 2) -> None:
    line = " ".join(message.split()).encode("utf-8", "backslashreplace").decode()
    with contextlib.suppress(OSError):
        say(f"edge-sd: {line}", error=True)
    sys.exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"edge-sd {__version__}")
        raise typer.Exit


START = """\
edge-sd draws pictures on this machine. To start:

  edge-sd generate "a red apple"   a picture, without any download
  edge-sd serve                    a page to draw in, and two APIs for other programs
  edge-sd models list              what is installed; edge-sd models pull gets more

All commands: edge-sd --help"""


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = (
        False
    ),
) -> None:
    if context.invoked_subcommand is None:
        print(START)


@takes_request
def generate(
    wishes: dict[str, Any],
    prompt: Annotated[str | None, typer.Argument(help="What to draw.", show_default=False)] = None,
    from_: Annotated[
        Path | None, typer.Option("--from", help="Make this picture again; options beside it change it.")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help="Draw its rows into the folder --output, as edge-sd batch does.")
    ] = None,
    grid: Annotated[bool, typer.Option("--grid", help="All pictures in one file.")] = False,
    preset: Annotated[
        str | None,
        typer.Option(help="exact, balanced, fast, turbo: likeness for speed.", autocompletion=completion.presets),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A .png, .jpg or .webp file.")] = None,
    overwrite: Overwrite = False,
    model: Annotated[
        str | None,
        typer.Option(
            help="A name (edge-sd models list) or a folder. Default: emoji.", autocompletion=completion.models
        ),
    ] = None,
    variant: Annotated[str | None, typer.Option(help="A variant of the model (edge-sd models show).")] = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu, gpu, npu, ane, …; or one a component: unet=gpu,vae_decoder=cpu.")
    ] = "auto",
    prefer: machine.Prefer = "speed",
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="One component in memory at a time, weights in their files: slower.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say what runs where, and what not and why.")] = (
        False
    ),
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Draw a picture."""
    if prompts is not None:
        beside = {"prompt": prompt, "--from": from_, "--grid": grid, "--overwrite": overwrite, "--verbose": verbose}
        place = Place(model or "emoji", variant, device, prefer, preset or "exact", low_memory)
        batches.draw_prompts(prompts, wishes, place, output, beside, batches.How(as_json=as_json, quiet=quiet))
        return
    from edge_sd.pipeline.pipeline import Pipeline
    from edge_sd.pipeline.recorded import read_recorded
    from edge_sd.pipeline.reproduce import open_recorded

    placed = parse_device(device)
    recorded = None if from_ is None else read_recorded(from_)
    given = fields_of(wishes, recorded) | ({} if prompt is None else {"prompt": prompt})
    request = _request(given, recorded, preset)
    silent = quiet or as_json
    saver = Saver(output, request.prompt, request.count or 1, grid=grid, overwrite=overwrite, say=not silent)
    saver.check()
    tell = messages(silent)
    options: dict[str, Any] = {"preference": prefer, "tell": tell, "low_memory": low_memory, "measure": True}
    if recorded is None:
        opened = Pipeline.open(model or "emoji", placed, variant, preset=preset or "exact", **options)
    else:
        opened = open_recorded(recorded, model, placed, variant, preset, **options)
    with opened as pipeline:
        run = pipeline.run(request)  # Report mistakes before anything is printed.
        if recorded is not None:
            recorded.check(run.settings)
            for note in recorded.notes(given):
                tell(f"note: {note}")
        plan = pipeline.expected(run)
        tell(plan.explain() if verbose else plan.summary())
        with saver, step_progress(request, silent) as on_step:
            result = pipeline.draw(run, on_step, saver.save)
    deliver(result, saver, as_json, quiet)


def _request(given: dict[str, Any], recorded: Recorded | None, preset: str | None) -> Request:
    """What is asked for: what was given, and of a recorded picture the rest."""
    from edge_sd.pipeline.presets import preset_named
    from edge_sd.pipeline.request import Request

    if recorded is not None:
        # A preset's changes go before what was recorded, as options do.
        return recorded.request(**{**(preset_named(preset).changes if preset else {}), **given})
    if "prompt" not in given:
        raise InvalidRequest("there is no prompt: say what to draw, or give a picture to make again with --from")
    return Request(**given)


def convert(
    source: Annotated[
        str,
        typer.Argument(help="A diffusers folder, a .safetensors or .gguf checkpoint, an installed model, or ORG/NAME."),
    ],
    bundle: Annotated[Path, typer.Argument(help="The bundle to make, or to add the variant to.")],
    to: Annotated[str, typer.Option(help="openvino, coreml, coreai")] = "openvino",
    precision: Annotated[
        str,
        typer.Option(
            help="How weights are stored: fp32, fp16, int8, int4; Core ML: fp16, int8, p8, p6, p4, …; "
            "by parts: unet=w8a8,text=int8,vae=fp16"
        ),
    ] = "fp16",
    compute: Annotated[str | None, typer.Option(help="Core ML, Core AI: ane (Neural Engine) or gpu.")] = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="N|WxH[,…]", help="Core ML, Core AI: pixels, fixed; one or several."),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Core ML, Core AI: rows of the UNet, 1 or 2.")] = None,
    chunks: Annotated[bool, typer.Option("--chunks", help="Core ML: the UNet in two packages.")] = False,
    target: Annotated[str | None, typer.Option(help="Core ML: the oldest system to run on, iOS16 or macOS13 …")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="A checkpoint's tokenizer: vocab.json and merges.txt, or a model's folder.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="The rest of the model, for a file of a denoiser alone: a diffusers folder, or ORG/NAME."),
    ] = None,
    prediction: Annotated[
        str | None, typer.Option(help="What a checkpoint's UNet predicts: epsilon or v_prediction.")
    ] = None,
    vae: Annotated[str | None, typer.Option(help="Another autoencoder: its folder, or ORG/NAME.")] = None,
    tiny_vae: Annotated[
        str | None, typer.Option(help="A tiny autoencoder (TAESD) to add: folder, or ORG/NAME.")
    ] = None,
    upscaler: Annotated[
        Path | None, typer.Option(help="An upscaler of ESRGAN's class to add, a .safetensors file.")
    ] = None,
    controlnet: Annotated[str | None, typer.Option(help="A ControlNet to add: its folder, or ORG/NAME.")] = None,
    ip_adapter: Annotated[
        Path | None, typer.Option(help="An IP-Adapter to add, base or plus, a .safetensors file.")
    ] = None,
    image_encoder: Annotated[
        str | None, typer.Option(help="The IP-Adapter's CLIP: its folder, or ORG/NAME. Default: beside the file.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Convert a model's weights, measure them against torch, and add them to a bundle."""
    from edge_sd.converters.build import build, require_extra, variant_name
    from edge_sd.converters.recipes import recipe_named
    from edge_sd.converters.sources.checkpoint import unpacked
    from edge_sd.converters.sources.parts import composed
    from edge_sd.converters.sources.source import Source
    from edge_sd.converters.targets import form_named

    sizes = tuple(parse_size(each) for each in size.split(",")) if size else None
    form = form_named(to, compute=compute, target=target, sizes=sizes, batch=batch, chunks=chunks or None)
    recipe = recipe_named(precision, form.recipes)
    require_extra()
    hush_libraries()
    checkpoint = unpacked(source, bundle, tokenizer=tokenizer, prediction=prediction, base=base)
    parts = {
        "vae": vae, "vae_tiny": tiny_vae, "controlnet": controlnet, "upscaler": upscaler, "ip_adapter": ip_adapter,
        "image_encoder": image_encoder,
    }  # fmt: skip
    with (
        progress(quiet or as_json, "reading") as report,
        checkpoint as folder,
        composed(folder, bundle, parts) as whole,
    ):
        made = build(whole, bundle, form, recipe, report)
        name = variant_name(form, recipe, Source.open(whole).origin)
    _say_variant(made, name, as_json, quiet)


def _say_variant(bundle: ModelBundle, name: str, as_json: bool, quiet: bool) -> None:
    """What was converted: size, and the measured parity of each component."""
    variant = bundle.variant(name)
    rows = {
        part: {"psnr": artifact.parity.psnr, "max_error": artifact.parity.max_error, "precision": artifact.precision}
        for part, artifact in variant.artifacts.items()
        if artifact.parity
    }
    if as_json:
        say_json({"bundle": str(bundle.root), "variant": name, "bytes": variant.size(), "parity": rows})
    elif not quiet:
        width = max(map(len, rows), default=0)
        for part, row in rows.items():
            own = str(row["precision"])
            kept = " in float32: it overflows float16" if own == "float32" else own and f", {own}"
            say(f"{part:{width}} {row['psnr']:6.1f} dB against torch float32{kept}", error=True)
        say(f"{name}: {variant.size() / 1e6:.1f} MB", error=True)
        say(bundle.root)


# Heading of the help page -> its commands, in its order; groups of commands come after single ones.
PANELS: dict[str, tuple[Any, ...]] = {
    "Draw": (generate, run, upscale, pictures.interpolate, batches.batch, pictures.info),
    "Models": (convert, bench, (models.app, "models"), (compare.app, "compare"), (train.app, "train")),
    "This machine": (machine.devices, machine.tune, machine.doctor, (cache.app, "cache"), (macos.app, "macos")),
    "For other programs, and as a page": (serve, desktop, mcp, manual),
}
for panel, commands in PANELS.items():
    for each in commands:
        if isinstance(each, tuple):
            app.add_typer(each[0], name=each[1], rich_help_panel=panel)
            continue
        # What run does not know goes to generate.
        passed_on = {"allow_extra_args": True, "ignore_unknown_options": True} if each is run else {}
        app.command(epilog=epilog(each.__name__), context_settings=passed_on, rich_help_panel=panel)(each)
