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
from diffusers import AutoencoderTiny, ControlNetModel
from PIL import Image

from edge_sd import ModelBundle, Pipeline, Request
from edge_sd.converters.parity import psnr
from edge_sd.converters.training import (
    autoencoder,
    card,
    codes,
    controlnet,
    data,
    diffusion,
    distill,
    evaluate,
    evaluator,
    latents,
    publish,
    start,
    taesd,
    text,
    unet,
    widen,
    wordnet,
)
from edge_sd.converters.training.loop import Budget, Run, learning_rate
from edge_sd.converters.training.publish import COREML, FEW_STEPS, MANY_STEPS
from edge_sd.converters.training.shards import ShardLatents, pictures
from edge_sd.errors import InvalidRequest

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
    for module in (data, card, evaluator, widen):
        monkeypatch.setattr(module, "core_vocabulary", lambda: LABELS)
    monkeypatch.setattr(latents, "VARIANTS", 2)
    for module, lessons, tests in ((controlnet, 18, 4), (taesd, 6, 2)):
        monkeypatch.setattr(module, "LESSONS", lessons)
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
    (folder / "artwork.json").write_text(json.dumps({"concepts": concepts, "words": ["thing", "apples"]}))
    return folder


@pytest.mark.slow
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
    shards = [name for name in bundle.variants[MANY_STEPS].artifacts["unet"].weights if name.endswith(".safetensors")]
    assert len(shards) > 1
    assert max(path.stat().st_size for path in model.rglob("*.*")) < 25e6
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
    assert np.array_equal(latents.load(work, vae, "cpu", 1).z, first.z), "they are kept"
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


def test_pca_is_numpy_s_and_no_code_of_its_size_is_nearer() -> None:
    x = torch.randn(60, 12, generator=torch.Generator().manual_seed(0)) @ torch.randn(12, 12)
    wide = torch.randn(10, 50, generator=torch.Generator().manual_seed(1))
    for rows, count in ((x, 4), (wide, 6)):
        u, s, vt = np.linalg.svd((rows - rows.mean(0)).numpy(), full_matrices=False)
        best = rows.mean(0).numpy() + (u[:, :count] * s[:count]) @ vt[:count]
        torch.testing.assert_close(
            codes.PCA.fit(rows, count).round_trip(rows), torch.from_numpy(best), atol=1e-3, rtol=0
        )
    pictures_ = torch.randn(2, 3, 16, 24)
    torch.testing.assert_close(codes.from_patches(codes.to_patches(pictures_), pictures_.shape), pictures_)


def test_the_consistency_function_is_the_picture_at_t_0_and_lcm_schedulers() -> None:
    from diffusers import LCMScheduler

    theirs = LCMScheduler(**diffusion.SCHEDULE)
    generator = torch.Generator().manual_seed(0)
    x, v = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    abar = diffusion.alphas_cumprod()
    torch.testing.assert_close(distill.consistency(x, torch.tensor([0, 0]), v, abar), x)
    theirs.set_timesteps(4)
    for time in theirs.timesteps:
        ours = distill.consistency(x, time.expand(2), v, abar)
        torch.testing.assert_close(ours, theirs.step(v, time, x, return_dict=False)[1], atol=1e-4, rtol=1e-3)
        theirs._step_index = None


def test_words_are_of_the_kind_that_wordnet_says(tmp_path: Path) -> None:
    """Lines in the form of wndb(5WN): a beagle is a hound is a dog; a bank is no dog; "dog" itself needs no lesson."""
    lines = ["  1 This software", ""]
    senses = [
        ("dog domestic_dog", 5, [], "a member of the genus Canis"), ("hound", 5, [0], "a dog for hunting"),
        ("beagle", 5, [1], "a small hound; \"her beagle barked\""),
        ("bank", 17, [], "sloping land"), ("wienerwurst dog", 13, [], "a sausage"),
    ]  # fmt: skip
    places, text_ = [], "  1 This software\n"
    for words, category, parents, said in senses:
        places.append(len(text_))
        names = words.split()
        pointers = "".join(f" @ {places[parent]:08d} n 0000" for parent in parents)
        listed = " ".join(f"{name} 0" for name in names)
        text_ += (
            f"{places[-1]:08d} {category:02d} n {len(names):02x} {listed} {len(parents):03d}{pointers} | {said}  \n"
        )
    (tmp_path / "data.noun").write_text(text_)
    index = {"dog": [0, 4], "domestic_dog": [0], "hound": [1], "beagle": [2], "bank": [3], "wienerwurst": [4]}
    lines = [f"{word} n {len(rows)} 1 @ {len(rows)} 1 {' '.join(f'{places[n]:08d}' for n in rows)}  "
             for word, rows in index.items()]  # fmt: skip
    (tmp_path / "index.noun").write_text("  1 This software\n" + "\n".join(lines) + "\n")
    words = wordnet.read(tmp_path)
    assert words.senses[places[2]] == wordnet.Sense(("beagle",), 5, (places[1],), "a small hound")
    kinds = words.kinds([("dog", "dog face"), ("hot wienerwurst", "hot dog")])
    assert kinds == dict.fromkeys(("dog", "domestic dog", "hound", "beagle"), "dog face") | {"wienerwurst": "hot dog"}
    assert words.singular("dogs") == "dog"
    assert words.singular("dragon") is None


@pytest.mark.parametrize(
    ("word", "many"),
    [
        ("cherry", "cherries"),
        ("key", "keys"),
        ("bus", "buses"),
        ("cactus", "cacti"),
        ("snowman", "snowmen"),
        ("box", "boxes"),
    ],
)
def test_plurals_follow_english(word: str, many: str) -> None:
    assert wordnet.plural(word) == many


def test_a_drawing_is_turned_whole() -> None:
    """A disc in the middle stays a disc of nearly its size, whichever way it is turned; nothing lends it a colour."""
    rows, columns = np.indices((data.SIZE, data.SIZE)) - data.SIZE / 2 + 0.5
    disc = np.zeros((data.SIZE, data.SIZE, 4), np.uint8)
    disc[rows**2 + columns**2 < 30**2] = (200, 40, 90, 255)
    for seed in range(8):
        moved = controlnet.turned(disc, np.random.default_rng(seed))
        area = (moved[..., 3] > 127).sum() / (np.pi * 30**2)
        assert 1 / 1.5**2 - 0.05 < area < 1 / 0.9**2 + 0.05
        inside = moved[moved[..., 3] > 250][:, :3]
        assert np.abs(inside.astype(int) - (200, 40, 90)).max() <= 2


def test_states_of_captions_are_compared_place_by_place() -> None:
    states = torch.arange(8.0)[:, None].repeat(1, 3)
    known, new = torch.tensor([9, 1, 2, 5, 0, 0, 0, 0]), torch.tensor([9, 1, 3, 4, 5, 0, 0, 0])
    assert float(widen.difference(states, states, known, known)) == 0
    moved = states.clone()
    moved[4:] = states[3:7]  # the same states, one place later
    moved[2:4] = torch.tensor([[1.0], [3.0]]).repeat(1, 3)  # two tokens with the mean of the one they stand for
    assert float(widen.difference(moved, states, new, known)) == 0
    moved[5] += 1
    assert float(widen.difference(moved, states, new, known)) > 0


def test_common_words_come_more_often_but_not_alone() -> None:
    """By the square root: a hundred times as common is ten times as often; what nobody writes still comes."""
    dog, beagle, none = widen.commonness(["dog", "beagle", "xyzzyplugh qwrt"])
    assert dog > 10 * beagle > 10 * none > 0


def test_a_stage_before_its_turn_names_the_one_that_is_missing(work: Path, tmp_path: Path) -> None:
    for stage in (unet.train, autoencoder.train_decoder):
        with pytest.raises(InvalidRequest, match="edge-sd train autoencoder"):
            stage(work, Budget(steps=1))
    with pytest.raises(InvalidRequest, match="edge-sd train data"):
        autoencoder.train(tmp_path / "empty", Budget(steps=1))


def test_forward_diffusion_is_diffusers() -> None:
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(**diffusion.SCHEDULE)
    generator = torch.Generator().manual_seed(0)
    x_0, eps = (torch.randn(5, 4, 16, 16, generator=generator) for _ in range(2))
    t = torch.tensor([0, 10, 500, 900, 999])
    x_t, v_t = diffusion.diffuse(x_0, eps, diffusion.alphas_cumprod()[t])
    torch.testing.assert_close(x_t, theirs.add_noise(x_0, eps, t), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(v_t, theirs.get_velocity(x_0, eps, t), atol=1e-5, rtol=1e-4)


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


def test_a_shifted_drawing_leaves_nothing_on_the_other_side() -> None:
    drawing = np.full((data.SIZE, data.SIZE, 4), 255, np.uint8)
    for dy, dx in ((5, 0), (-5, 3), (0, -7), (0, 0)):
        moved = data._shifted(drawing, dy, dx)
        assert moved.sum() == 255 * 4 * (data.SIZE - abs(dy)) * (data.SIZE - abs(dx))


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


def test_the_learning_rate_warms_up_and_falls() -> None:
    rates = [learning_rate(1.0, step, step / 1000, warmup=100) for step in range(1001)]
    assert rates[0] == pytest.approx(0.01, rel=0.1)
    assert max(rates) <= 1
    assert rates[-1] == pytest.approx(0.01)
    with pytest.raises(ValueError, match="either"):
        Budget()
