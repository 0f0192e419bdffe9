"""`edge-sd train`: the stages of the embedded model, in the order in which they build on each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from edge_sd.errors import InvalidRequest, MissingExtra

from .libraries import hush_libraries
from .terminal import progress

app = typer.Typer(help="Make the embedded model again, from artwork to weights.", no_args_is_help=True)

Work = Annotated[Path, typer.Option(help="Where artwork, checkpoints and logs are kept.")]
Minutes = Annotated[float | None, typer.Option(help="How long to train.")]
Steps = Annotated[int | None, typer.Option(help="Or how many steps.")]
TorchDevice = Annotated[str, typer.Option(help="cpu or cuda")]
Shards = Annotated[str | None, typer.Option(help='webdataset shards to learn from: "folder/name-{000..015}.tar".')]
WORK = Path("training-work")


@contextmanager
def training_libraries() -> Iterator[None]:
    """Raise MissingExtra unless all that training imports is installed; keep those libraries quiet."""
    from importlib.util import find_spec

    needed = ("torch", "diffusers", "transformers", "accelerate", "peft", "resvg_py", "coremltools")
    if not all(find_spec(name) for name in needed):
        raise MissingExtra("training", "train")
    hush_libraries()
    yield


def _run(stage: Callable[..., None], work: Path, minutes: float | None, steps: int | None, **options: Any) -> None:
    from edge_sd.converters.training.loop import Budget

    if (steps is None) == (minutes is None):
        raise InvalidRequest("give either --steps or --minutes")
    with progress(False, "preparing") as report:
        stage(work, Budget(steps, minutes, report), **options)


def _add_stage(name: str, module: str, function: str, about: str) -> None:
    """A command that runs edge_sd.converters.training.MODULE.FUNCTION within a budget, resuming where it stopped."""

    def command(
        work: Work = WORK,
        minutes: Minutes = None,
        steps: Steps = None,
        device: TorchDevice = "cpu",
        seed: int = 0,
    ) -> None:
        with training_libraries():
            stage = getattr(import_module(f"edge_sd.converters.training.{module}"), function)
            _run(stage, work, minutes, steps, device=device, seed=seed)

    app.command(name, help=about)(command)


def _add_stage_with_shards(name: str, module: str, about: str) -> None:
    """The same for a stage that also learns from webdataset shards."""

    def command(
        work: Work = WORK,
        minutes: Minutes = None,
        steps: Steps = None,
        device: TorchDevice = "cpu",
        seed: int = 0,
        shards: Shards = None,
    ) -> None:
        with training_libraries():
            stage = import_module(f"edge_sd.converters.training.{module}").train
            _run(stage, work, minutes, steps, device=device, seed=seed, shards=shards)

    app.command(name, help=about)(command)


@app.command("data")
def data(work: Work = WORK) -> None:
    """Install the artwork from npm and rasterise it."""
    with training_libraries():
        from edge_sd.converters.training import data

        data.prepare(work)


@app.command("start")
def start(model: Annotated[str, typer.Argument(help="A model's name or folder.")], work: Work = WORK) -> None:
    """Go on from a published model instead of from nothing."""
    with training_libraries():
        from edge_sd.converters.training.start import start_from

        start_from(model, work)


_add_stage_with_shards("autoencoder", "autoencoder", "Train the autoencoder; resumes where it stopped.")
_add_stage_with_shards("unet", "unet", "Train the UNet and the text encoder together; resumes where it stopped.")
_add_stage("decoder", "autoencoder", "train_decoder", "Sharpen the decoder; the latents stay what they are.")
_add_stage("text", "widen", "train", "Teach the text encoder words that no caption holds, from a sentence model.")
_add_stage("controlnet", "controlnet", "train", "Train a ControlNet that follows lines.")
_add_stage("distill", "distill", "train", "Distil the UNet to four steps, as a LoRA.")
_add_stage("taesd", "taesd", "train", "Train the tiny autoencoder for previews.")
_add_stage("evaluator", "evaluator", "train", "Train the judge that grades generated pictures.")


@app.command("publish")
def publish(
    target: Annotated[Path, typer.Argument(help="The folder of the embedded model.")], work: Work = WORK
) -> None:
    """Round to float16, convert, and write the model's folder with its card."""
    with training_libraries():
        from edge_sd.converters.training import publish

        with progress(False, "rounding") as report:
            publish.publish(work, target, report)


@app.command("eval")
def evaluate(
    model: Annotated[Path, typer.Argument(help="The folder of a published model.")],
    work: Work = WORK,
    pictures: Annotated[int, typer.Option(min=1, help="How many to draw and grade; few-step ones come on top.")] = 1000,
) -> None:
    """Let the judge grade the model's pictures, and write the figures into its card."""
    with training_libraries():
        from edge_sd.converters.training import card, evaluate

        with progress(False, "drawing") as report:
            evaluate.evaluate(model, work, pictures=pictures, watch=report)
        card.write_card(work, model)
