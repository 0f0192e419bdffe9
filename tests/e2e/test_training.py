"""The recipe of the embedded model, run from artwork to a published model on a handful of made-up drawings."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, ControlNetModel, StableDiffusionPipeline
from PIL import Image

from edge_sd import ModelBundle, Pipeline, Request
from edge_sd.converters.parity import psnr
from edge_sd.converters.training import (
    autoencoder,
    card,
    codes,
    composition,
    controlnet,
    data,
    diffusion,
    distill,
    evaluate,
    evaluator,
    latents,
    lessons,
    publish,
    scenes,
    start,
    taesd,
    text,
    unet,
    widen,
    wordnet,
)
from edge_sd.converters.training.loop import Budget, Run
from edge_sd.converters.training.publish import COREML, FEW_STEPS, MANY_STEPS
from edge_sd.converters.training.shards import ShardLatents, pictures
from edge_sd.errors import InvalidRequest
from edge_sd.text.known_words import KnownWords

LABELS = ["red apple", "rocket", "cat face"]
# WordNet is an npm package of 30 MB; these are some of its senses, by their places.
NOUNS = wordnet.WordNet(
    {
        1: wordnet.Sense(("cat",), 5, (), "a feline mammal"),
        2: wordnet.Sense(("tabby",), 5, (1,), "a cat with a grey coat"),
        3: wordnet.Sense(("rocket",), 6, (), "a vehicle"),
        4: wordnet.Sense(("missile",), 6, (3,), "a rocket carrying a warhead"),
        5: wordnet.Sense(("jalapeno",), 13, (), "hot green or red pepper"),
        6: wordnet.Sense(("steeple",), 6, (), "a tall tower"),
    },
    {"cat": (1,), "tabby": (2,), "rocket": (3,), "missile": (4,), "jalapeno": (5,), "steeple": (6,)},
)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A prepared folder of three concepts: coloured discs in place of artwork."""
    for module in (data, card, composition, evaluator, lessons, scenes, widen):
        monkeypatch.setattr(module, "core_vocabulary", lambda: LABELS)
    for name, count in (("VARIANTS", 2), ("RECOLOURED", 4), ("SCENES", 6)):
        monkeypatch.setattr(lessons, name, count)
    monkeypatch.setattr(evaluate, "SEEDS", 2)
    for module, count, tests in ((controlnet, 18, 4), (taesd, 6, 2)):
        monkeypatch.setattr(module, "LESSONS", count)
        monkeypatch.setattr(module, "TESTS", tests)
    # All widths cut down, and a block of the UNet: the way is the same.
    for config, smaller in (
        (unet.CONFIG, {"block_out_channels": [32, 64], "attention_head_dim": [1, 2],
                       "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
                       "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}),
        (autoencoder.CONFIG, {"block_out_channels": [16, 16, 32, 32]}),
        (text.CONFIG, {"num_hidden_layers": 2}),
    ):  # fmt: skip
        for key, value in smaller.items():
            monkeypatch.setitem(config, key, value)
    for module in (autoencoder, controlnet, distill, evaluator, taesd, unet, widen):
        monkeypatch.setattr(module, "BATCH", 4)
    monkeypatch.setattr(publish, "SHARD", "1MB")
    monkeypatch.setattr(codes, "COLOURED", [("rocket", "flat"), ("cat face", "glossy")])
    monkeypatch.setattr(wordnet, "install", lambda: NOUNS)
    folder = tmp_path / "work"
    folder.mkdir()
    rows, columns = np.indices((data.SIZE, data.SIZE)) - data.SIZE / 2
    pixels = np.zeros((20, 4, data.SIZE, data.SIZE, 4), np.uint8)
    for n in range(20):
        pixels[n, :, rows**2 + columns**2 < (20 + 2 * n) ** 2] = (10 * n, 255 - 10 * n, 80, 255)
    np.savez_compressed(folder / "artwork.npz", pixels=pixels)
    labels = [*LABELS, *(f"thing {n}" for n in range(17))]
    concepts = [{"label": label, "group": 0, "keywords": ["thing"]} for label in labels]
    document = {"concepts": concepts, "words": ["thing", "apples"], "translations": {"de": {"cat": "Katze"}}}
    (folder / "artwork.json").write_text(json.dumps(document))
    return folder


@pytest.mark.long
def test_the_recipe_runs_from_artwork_to_a_graded_picture(work: Path, tmp_path: Path) -> None:
    for stage in (autoencoder.train, unet.train, widen.train):
        stage(work, Budget(steps=2))
    weights = [work / part / file for part, file in (("text_encoder", "model.safetensors"), ("text_encoder_wide",
               "model.safetensors"), ("unet", "diffusion_pytorch_model.safetensors"))]  # fmt: skip
    before = [path.read_bytes() for path in weights]
    # Every fourth step goes into the average.
    unet.train(work, Budget(steps=4))
    for stage in (autoencoder.train_decoder, controlnet.train, distill.train, taesd.train, evaluator.train):
        stage(work, Budget(steps=2))
    changed = [path.read_bytes() != was for path, was in zip(weights, before, strict=True)]
    assert changed == [False, False, True], "with a wide vocabulary the UNet goes on alone"
    assert torch.load(work / "unet_wide.checkpoint.pt", weights_only=True)["modules"].keys() == {"unet"}
    model = tmp_path / "model"
    publish.publish(work, model)
    bundle = ModelBundle.open(model)
    assert bundle.verify() == []
    known = KnownWords.read(model)
    assert known is not None
    assert known.note("emoji", "a red apple") == ""
    shards = [name for name in bundle.variants[MANY_STEPS].artifacts["unet"].weights if name.endswith(".safetensors")]
    assert len(shards) > 1
    assert max(path.stat().st_size for path in model.rglob("*.*")) < 25e6
    drawn = StableDiffusionPipeline.from_pretrained(model)(
        "a red apple", num_inference_steps=1, output_type="np"
    ).images
    assert drawn.shape == (1, 128, 128, 3), "as it is, without a word about precision"
    ControlNetModel.from_pretrained(model / "controlnet")
    AutoencoderTiny.from_pretrained(model / "vae_tiny")
    constants = model / "openvino-fp16/unet/openvino_model.constants"
    assert constants.stat().st_size < 10_000, "the weights stand in the safetensors files alone"

    packages = model / COREML
    assert sum(path.stat().st_size for path in packages.rglob("*.constants")) < 100_000
    assert sum(path.stat().st_size for path in packages.rglob("*") if path.is_file()) < 3e6

    with Pipeline.open(model, "coreml-reference") as pipeline:
        assert pipeline.generate(Request("red apple", seed=0, steps=1)).pictures[0].variant == COREML
    with Pipeline.open(model) as pipeline:
        assert pipeline.generate(Request("red apple", seed=0, steps=2)).pictures[0].image.size == (128, 128)
    few = bundle.variants[FEW_STEPS].artifacts
    assert [part for part, artifact in few.items() if artifact.lora] == ["unet", "controlled_unet"]
    with Pipeline.open(model, variant=FEW_STEPS) as pipeline:
        settings = pipeline.generate(Request("red apple", seed=0)).pictures[0].settings
        assert (settings.steps, settings.guidance, settings.sampler) == (4, 1, "lcm")

    rows = evaluate.evaluate(model, work, pictures=5)
    assert rows["seen, 20 steps"]["count"] == 3
    assert rows["unseen, 4 steps"]["count"] == 4, "prompts of concepts that this model was taught"
    assert rows["pixels"].keys() == {"colour", "white", "variety"}
    assert all(0 <= share <= 1 for row in rows["composition"].values() for share in row.values())
    assert all(0 <= rows["control"][kind] <= 1 for kind in ("lines", "outlines"))
    card.write_card(work, model)
    text_of_card = (model / "README.md").read_text()
    assert "| 2 |" in text_of_card
    assert "held out, 1 step" in text_of_card
    assert (model / "held_out.txt").read_text().count("\n") == sum(
        data.is_held_out(label, style) for label in LABELS for style in data.STYLES
    )
    codes_of = codes.compare(model, work, tmp_path / "codes.png")
    assert set(codes_of) == {"the noisy picture itself", "patch PCA", "picture PCA", "autoencoder"}


@pytest.mark.slow
def test_latents_are_those_of_the_encoder_that_is_there(work: Path) -> None:
    autoencoder.train(work, Budget(steps=1))
    vae = autoencoder.load(work)
    first = latents.load(work, vae, "cpu", 0)
    made = (work / "latents.npz").stat().st_mtime_ns
    assert np.array_equal(latents.load(work, vae, "cpu", 0).z, first.z)
    assert (work / "latents.npz").stat().st_mtime_ns == made, "they are kept"
    assert not np.array_equal(latents.load(work, vae, "cpu", 1).z, first.z), "another seed plans other lessons"
    with torch.no_grad():
        vae.encoder.conv_in.weight.mul_(1.5)
    assert not np.array_equal(latents.load(work, vae, "cpu", 0).z, first.z)


@pytest.mark.slow
def test_the_published_parts_are_what_diffusers_loads(emoji: Path) -> None:
    """The few-step variant here, and the LoRA as diffusers applies it: one picture."""
    from diffusers import LCMScheduler, StableDiffusionPipeline

    theirs = StableDiffusionPipeline.from_pretrained(emoji, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    theirs.load_lora_weights(emoji / "lcm", weight_name="pytorch_lora_weights.safetensors")
    theirs.scheduler = LCMScheduler.from_config(theirs.scheduler.config)
    with Pipeline.open(emoji, variant=FEW_STEPS) as pipeline:
        picture = pipeline.generate(Request("a red apple, glossy style", seed=7)).pictures[0]
    one = theirs(
        picture.settings.prompt, num_inference_steps=4, guidance_scale=1.0, height=128, width=128,
        generator=torch.Generator().manual_seed(7),
    ).images[0]  # fmt: skip
    assert psnr(np.asarray(picture.image), np.asarray(one), 255) > 35


def test_diffusers_draws_with_the_embedded_model_as_it_is(emoji: Path) -> None:
    """No word about precision: transformers takes its config's, diffusers float32, and the two have to agree."""
    theirs = StableDiffusionPipeline.from_pretrained(emoji)
    theirs.set_progress_bar_config(disable=True)
    drawn = theirs("a red apple", num_inference_steps=2, output_type="np").images
    assert drawn.shape == (1, 128, 128, 3)
    assert float(drawn.std()) > 0.05


def test_no_word_of_the_unseen_prompts_stands_in_a_caption(artwork_words: set[str]) -> None:
    asked = evaluate.unseen_subjects(data.core_vocabulary())
    assert len(asked) == 100
    assert {subject.concept for subject in asked} <= set(data.core_vocabulary())
    for subject in asked:
        name = subject.prompt.split(", ")[0].removeprefix("a ")
        assert not set(name.split()) & artwork_words, subject.prompt


@pytest.fixture(scope="session")
def artwork_words() -> set[str]:
    """Every word that a caption can hold: labels, plain names and keywords of the core vocabulary, from a kept list."""
    words = set((Path(__file__).parents[1] / "data/caption_words.txt").read_text("utf-8").split())
    labels = {word for label in data.core_vocabulary() for word in label.lower().replace("-", " ").split()}
    assert labels <= words
    return words


def test_training_from_shards_and_from_artwork_is_one_code(work: Path, tmp_path: Path) -> None:
    autoencoder.train(work, Budget(steps=1))
    with tarfile.open(tmp_path / "pictures-000.tar", "w") as shard:
        for n in range(4):
            image = BytesIO()
            Image.new("RGB", (40, 30), (60 * n, 0, 90)).save(image, "PNG")
            for ending, content in (("png", image.getvalue()), ("txt", b"a plain colour")):
                entry = tarfile.TarInfo(f"{n}.{ending}")
                entry.size = len(content)
                shard.addfile(entry, BytesIO(content))
    pattern = str(tmp_path / "pictures-{000..000}.tar")
    vae = autoencoder.load(work)
    z, captions, _ = ShardLatents(pattern, vae, "cpu", 0).batch(6, np.random.default_rng(0))
    assert z.shape == (6, 4, 16, 16)
    assert set(captions) <= {"a plain colour", ""}
    unet.train(work, Budget(steps=1), shards=pattern)
    assert (work / "unet/config.json").is_file()
    with pytest.raises(InvalidRequest, match="shards"):
        next(pictures(str(tmp_path / "none-{0..1}.tar"), 0))


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Under accelerate each draws its own batch, gradients are averaged, and one writes: weights stay equal."""
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    # accelerate's own launcher starts several processes on CPUs through MPI only; on GPUs it calls this one.
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (json.loads((tmp_path / f"{n}.json").read_text()) for n in range(2))
    assert first["weight"] == pytest.approx(second["weight"])
    assert first["seen"] != second["seen"]
    # The mean of both processes' gradients, worked out alone.
    assert first["gradient"] == pytest.approx((first["own"] + second["own"]) / 2, rel=1e-5)


TWO_PROCESSES = """
import json, sys
from pathlib import Path
import torch
from edge_sd.converters.training.loop import Budget, Run

folder = Path(sys.argv[1])
torch.manual_seed(0)
line = torch.nn.Linear(1, 1, bias=False)
run = Run("line", folder, {"line": line}, Budget(steps=3), peak=0.1)
seen, own = [], []

def loss_of(step):
    x = torch.tensor([[float(run.rng(0).uniform(1, 2)) + step]])
    seen.append(float(x))
    loss = (line(x) - 1).square().mean()
    if step == 0:
        own.append(float(torch.autograd.grad(loss, line.weight, retain_graph=True)[0]))
    return loss, {}

reduced = []
average = run._average_gradients
def averaged():
    average()
    reduced.append(float(line.weight.grad))
run._average_gradients = averaged
run.train(loss_of, every=100)
row = {"weight": float(line.weight), "seen": seen, "own": own[0], "gradient": reduced[0]}
(folder / f"{run.processes.process_index}.json").write_text(json.dumps(row))
"""


def test_a_stage_before_its_turn_names_the_one_that_is_missing(work: Path, tmp_path: Path) -> None:
    for stage in (unet.train, autoencoder.train_decoder):
        with pytest.raises(InvalidRequest, match="edge-sd train autoencoder"):
            stage(work, Budget(steps=1))
    with pytest.raises(InvalidRequest, match="edge-sd train data"):
        autoencoder.train(tmp_path / "empty", Budget(steps=1))


def test_the_published_model_has_the_recipes_schedule(emoji: Path) -> None:
    schedule = ModelBundle.open(emoji).facts.schedule
    np.testing.assert_allclose(schedule.compute_alphas_cumprod(), diffusion.alphas_cumprod(), rtol=1e-4)
    assert schedule.prediction_type == diffusion.SCHEDULE["prediction_type"]


def test_one_pair_in_ten_is_held_out_and_the_file_lists_them(emoji: Path) -> None:
    pairs = [(label, style) for label in data.core_vocabulary() for style in data.STYLES]
    held_out = [pair for pair in pairs if data.is_held_out(*pair)]
    assert 0.07 < len(held_out) / len(pairs) < 0.13
    listed = [tuple(line.rsplit(", ", 1)) for line in (emoji / "held_out.txt").read_text("utf-8").splitlines()]
    assert listed == held_out


def test_a_published_model_is_a_start(work: Path, emoji: Path) -> None:
    """The next steps of a training go on from the weights of a model that was published."""
    start.start_from(emoji, work)
    unet.train(work, Budget(steps=Run.ema_every))
    ours, published = unet.build(work), unet.build(emoji)
    difference = max(float((a - b).abs().max()) for a, b in zip(ours.parameters(), published.parameters(), strict=True))
    assert 0 < difference < 0.01
    with pytest.raises(InvalidRequest, match="already holds"):
        start.start_from(emoji, work)


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    def run(steps: int) -> Run:
        torch.manual_seed(0)
        module = torch.nn.Linear(3, 1)
        trained = Run("line", tmp_path, {"line": module}, Budget(steps=steps), peak=0.1)
        x = torch.arange(12.0).reshape(4, 3) / 12
        trained.train(lambda step: ((module(x) - 1).square().mean(), {}), every=10, report=lambda line: None)
        return trained

    first = run(20)
    again = run(400)
    assert (first.step, again.step) == (20, 400)
    assert again.log[0]["step"] == 10
    assert again.log[-1]["loss"] < again.log[0]["loss"] / 10
    again.use_average()
    assert torch.isfinite(again.modules["line"].weight).all()
