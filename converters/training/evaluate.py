"""What the published model can do, in figures: generated pictures, named by a judge that never saw one (`evaluator`).

    seen        the concept of pictures of trained (concept, style) pairs: top-1, top-5; their style and background
    held out    the same for pairs that training never saw
    unseen      100 prompts in words that no caption holds (unseen_prompts.txt): the meant concept among the first five
    control     F1 of the picture's edges and the sketch it was told to follow, within 2 pixels

    composition colours bound, two things, positions, counts, of pairs that training never saw (composition.py)
    pixels      colours against the drawing's, evenness of white, variety of seeds (measures.py)

each for twenty guided steps and, but for the last three, for the few-step variant's four steps and one. The judge
itself is measured first, on the artwork through the autoencoder: its best possible score.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from edge_sd.images.canny import canny, edge_f1
from edge_sd.pipeline.pipeline import Pipeline
from edge_sd.pipeline.request import Request

from ..form import Report as Watch
from . import composition, controlnet, evaluator, measures
from .data import BACKGROUNDS, Artwork
from .publish import FEW_STEPS, MANY_STEPS
from .recolour import dominant_colour

Report = Callable[[str], None]
# The sets that are graded: artwork, and three sets of pictures in 20, 4 and 1 steps.
SETS = 1 + 3 * 3
# Pictures that share their steps: small ones run faster together.
TOGETHER = 8
# Prompts that leave much open, and how many seeds of each are compared.
VARIED, SEEDS = ("a cat", "a house", "a bird", "a car"), 12


@dataclass(frozen=True)
class Subject:
    """What a picture was asked to show."""

    prompt: str
    concept: str
    style: str | None = None
    background: str | None = None


@dataclass(frozen=True)
class Score:
    """Shares, 0 to 1, over `count` pictures; None where nothing was asked for."""

    count: int
    top1: float
    top5: float
    style: float | None
    background: float | None
    clip: float


def subjects(artwork: Artwork, *, held_out: bool, count: int, seed: int) -> list[Subject]:
    """`count` pairs in random order (again from the start where there are fewer), each on some background."""
    rng = np.random.default_rng([seed, held_out])
    pairs = list(artwork.pairs(held_out=held_out))
    order = np.concatenate([rng.permutation(len(pairs)) for _ in range(-(-count // len(pairs)))])[:count]
    chosen = []
    for n in order:
        label, style = pairs[int(n)]
        background = str(rng.choice(list(BACKGROUNDS)))
        chosen.append(Subject(f"{label}, {style} style, {background} background", label, style, background))
    return chosen


def unseen_subjects(labels: list[str]) -> list[Subject]:
    """The prompts of unseen_prompts.txt that mean one of the concepts `labels`."""
    rows = Path(__file__).with_name("unseen_prompts.txt").read_text("utf-8").splitlines()
    pairs = [row.split(" | ") for row in rows if row and not row.startswith("#")]
    return [Subject(prompt, concept) for prompt, concept in pairs if concept in labels]


def draw(pipeline: Pipeline, wanted: list[Subject], **settings: Any) -> list[Image.Image]:
    """One picture of each, seeds 0, 1, 2, …"""
    return [
        pipeline.generate(Request(subject.prompt, seed=seed, **settings)).pictures[0].image
        for seed, subject in enumerate(wanted)
    ]


class Judge:
    """The evaluator and its text side."""

    def __init__(self, model: Path) -> None:
        from transformers import CLIPTextModel, CLIPTokenizer

        self.network, self.config = evaluator.load(model / "evaluator")
        self.encoder = CLIPTextModel.from_pretrained(model / "text_encoder", torch_dtype=torch.float32).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")

    @torch.no_grad()
    def score(self, images: list[Image.Image], wanted: list[Subject]) -> tuple[Score, NDArray[np.bool_]]:
        """The score, and which pictures the judge named right at first."""
        from . import text

        outputs = [self.network(some) for some in evaluator.as_tensor(images).split(50)]
        concept, style, background, image = (torch.cat(rows) for rows in zip(*outputs, strict=True))
        ids = text.tokenize(self.tokenizer, [subject.prompt for subject in wanted])
        prompts = self.network.embed_text(self.encoder(ids).pooler_output)
        meant = torch.tensor([self.config["labels"].index(subject.concept) for subject in wanted])
        ranked = concept.topk(min(5, concept.shape[1])).indices == meant[:, None]

        def share(logits: torch.Tensor, names: list[str], asked: list[str | None]) -> float | None:
            known = [n for n, name in enumerate(asked) if name is not None]
            if not known:
                return None
            right = logits.argmax(1)[known] == torch.tensor([names.index(str(asked[n])) for n in known])
            return float(right.float().mean())

        score = Score(
            count=len(wanted),
            top1=float(ranked[:, 0].float().mean()),
            top5=float(ranked.any(1).float().mean()),
            style=share(style, self.config["style_names"], [subject.style for subject in wanted]),
            background=share(background, self.config["background_names"], [subject.background for subject in wanted]),
            clip=float((image * prompts).sum(1).mean()),
        )
        return score, ranked[:, 0].numpy()


def evaluate(
    model: Path, work: Path, *, pictures: int = 1000, report: Report = print, watch: Watch = lambda what, share: None
) -> dict[str, Any]:
    """All figures, also written to `model`/evaluation.json; pictures to look at go to `work`/evaluation.

    `report` gets the figures, `watch` the share of the sets that is graded. Of `pictures`, seven in ten are of trained
    pairs and two of held-out ones; the last tenth are the unseen prompts.
    """
    artwork, judge = Artwork(work), Judge(model)
    folder = work / "evaluation"
    folder.mkdir(exist_ok=True)
    sets = {
        "seen": subjects(artwork, held_out=False, count=max(1, pictures * 7 // 10), seed=0),
        "held out": subjects(artwork, held_out=True, count=max(1, pictures * 2 // 10), seed=0),
        "unseen": unseen_subjects(judge.config["labels"]),
    }
    rows: dict[str, Any] = {}
    graded: list[str] = []

    def keep(name: str, images: list[Image.Image], wanted: list[Subject]) -> None:
        score, _ = judge.score(images, wanted)
        rows[name] = score.__dict__
        report(f"{name:24} {_line(score)}")
        graded.append(name)
        watch(f"graded {name}", len(graded) / SETS)
        _contact_sheet(images[:96], folder / f"{name.replace(', ', '-').replace(' ', '-')}.png")

    best = sets["seen"][:200]
    keep("artwork", through_the_autoencoder(model, artwork, best), best)
    with Pipeline.open(model, variant=MANY_STEPS) as pipeline:
        for name, wanted in sets.items():
            images = draw(pipeline, wanted)
            keep(f"{name}, 20 steps", images, wanted)
            if name == "seen":
                nearest_sheet(images[:24], wanted[:24], artwork, folder / "nearest.png")
                rows["pixels"] = true_pixels(images, wanted, artwork)
        rows["pixels"]["variety"] = variety(pipeline, judge)
        rows["composition"] = composed(pipeline, model, artwork, judge, folder, count=max(1, pictures * 6 // 100))
    for kind, figures in (*rows["composition"].items(), ("pixels", rows["pixels"])):
        report(f"{kind:24} " + "  ".join(f"{name} {value:.2f}" for name, value in figures.items()))
    with Pipeline.open(model, variant=FEW_STEPS) as pipeline:
        for steps in (4, 1):
            for name, wanted in sets.items():
                keep(f"{name}, {steps} step{'s' * (steps > 1)}", draw(pipeline, wanted, steps=steps), wanted)
    if (model / "controlnet").is_dir():
        rows["control"] = controlled_f1(model, work, folder, count=max(1, pictures // 20))
        for kind, f1 in rows["control"].items():
            report(f"{kind:24} F1 of edges {f1:.2f}")
    (model / "evaluation.json").write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    return rows


def true_pixels(images: list[Image.Image], wanted: list[Subject], artwork: Artwork) -> dict[str, float]:
    """The mean CIEDE2000 of the pictures' dominant colours against their drawings', and how uneven white is drawn."""
    away, uneven = [], []
    for image, subject in zip(images, wanted, strict=True):
        rgb = np.asarray(image.convert("RGB"))
        rgba = artwork.drawing(subject.concept, str(subject.style))
        inside = rgba[..., 3] > 127
        own = dominant_colour(rgba[..., :3], inside)
        away.append(measures.difference(dominant_colour(rgb, measures.foreground(rgb)), own))
        if subject.background == "white":
            uneven.append(measures.unevenness(rgb, inside))
    return {"colour": float(np.mean(away)), "white": float(np.mean(uneven)) if uneven else 0.0}


@torch.no_grad()
def variety(pipeline: Pipeline, judge: Judge) -> float:
    """How far the pictures of one prompt are from one another, by the judge's features; mean of VARIED's prompts."""
    found = []
    for prompt in VARIED:
        images = draw(pipeline, [Subject(prompt, "")] * SEEDS)
        features = judge.network(evaluator.as_tensor(images))[3]
        found.append(measures.variety(features.numpy()))
    return float(np.mean(found))


def composed(pipeline: Pipeline, model: Path, artwork: Artwork, judge: Judge, folder: Path,
             *, count: int) -> dict[str, dict[str, float]]:  # fmt: skip
    """kind -> the share of right answers, of drawings seen through the autoencoder and of the model's pictures."""
    namer = composition.Namer(judge.network, judge.config["labels"])
    rows = {}
    for kind, asked in composition.questions(artwork, count).items():
        if not asked:
            continue
        examples = _through_the_autoencoder(model, [question.example.picture(artwork) for question in asked])
        images = draw(pipeline, [Subject(question.prompt, "") for question in asked])
        _contact_sheet(images[:96], folder / f"{kind.replace(' ', '-')}.png")
        rows[kind] = {
            "artwork": composition.share(asked, examples, namer),
            "pictures": composition.share(asked, images, namer),
        }
    return rows


def _line(score: Score) -> str:
    parts = [f"{score.count:5} pictures", f"top-1 {score.top1:.1%}", f"top-5 {score.top5:.1%}"]
    if score.style is not None:
        parts += [f"style {score.style:.1%}", f"background {score.background:.1%}"]
    return "  ".join([*parts, f"CLIP {score.clip:.2f}"])


def through_the_autoencoder(model: Path, artwork: Artwork, wanted: list[Subject]) -> list[Image.Image]:
    """The drawings themselves, encoded and decoded: the best that a UNet could do."""
    pictures = [
        artwork.picture(subject.concept, str(subject.style), BACKGROUNDS[str(subject.background)]) for subject in wanted
    ]
    return _through_the_autoencoder(model, pictures)


@torch.no_grad()
def _through_the_autoencoder(model: Path, pictures: list[NDArray[np.float32]]) -> list[Image.Image]:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(model / "vae", torch_dtype=torch.float32)
    x = torch.from_numpy(np.stack(pictures))
    return [_image(y) for some in x.split(8) for y in vae.decode(vae.encode(some).latent_dist.mean).sample.numpy()]


def _image(x: NDArray[np.float32]) -> Image.Image:
    """A picture of float32 [3, H, W] in [-1, 1]."""
    return Image.fromarray(((np.clip(x, -1, 1) + 1) * 127.5).round().astype(np.uint8).transpose(1, 2, 0))


def nearest_sheet(images: list[Image.Image], wanted: list[Subject], artwork: Artwork, path: Path) -> None:
    """Each picture above the training drawing that is nearest to it, by mean squared difference on its background."""
    trained = list(artwork.pairs())
    sheet = Image.new("RGB", (64 * len(images), 128))
    for n, (image, subject) in enumerate(zip(images, wanted, strict=True)):
        small = np.asarray(image.resize((64, 64)), np.float32)
        colour = BACKGROUNDS[subject.background or "white"]
        drawings = [_image(artwork.picture(label, style, colour)).resize((64, 64)) for label, style in trained]
        distance = [float(((np.asarray(drawing, np.float32) - small) ** 2).mean()) for drawing in drawings]
        sheet.paste(image.resize((64, 64)), (64 * n, 0))
        sheet.paste(drawings[int(np.argmin(distance))], (64 * n, 64))
    sheet.save(path)


def _contact_sheet(images: list[Image.Image], path: Path, columns: int = 16) -> None:
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (64 * columns, 64 * rows), "white")
    for n, image in enumerate(images):
        sheet.paste(image.resize((64, 64)), (n % columns * 64, n // columns * 64))
    sheet.save(path)


def sketches(artwork: Artwork, count: int) -> dict[str, list[tuple[NDArray[np.bool_], str]]]:
    """Drawings to follow and prompts, all of held-out pairs.

    lines      all edges of a drawing, under its own name: is it drawn where the lines are?
    outlines   the outline of a drawing, under another's name: does the shape win? (a cookie in the shape of a star)
    """
    rng = np.random.default_rng(0)
    pairs = list(artwork.pairs(held_out=True))
    found: dict[str, list[tuple[NDArray[np.bool_], str]]] = {"lines": [], "outlines": []}
    for _ in range(count):
        (label, style), (other, other_style) = (pairs[int(rng.integers(len(pairs)))] for _ in range(2))
        drawing = _image(artwork.picture(label, style, BACKGROUNDS["white"]))
        found["lines"].append((canny(np.asarray(drawing)), f"{label}, {style} style"))
        outline = controlnet.outline(artwork.silhouette(label, style))
        found["outlines"].append((outline, f"{other}, {other_style} style"))
    return found


@torch.no_grad()
def controlled_f1(model: Path, work: Path, folder: Path, *, count: int, steps: int = 20) -> dict[str, float]:
    """Mean F1 of the result's edges and the sketch it was told to follow, `count` pictures for each kind of sketch."""
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    net = ControlNetModel.from_pretrained(model / "controlnet", torch_dtype=torch.float32)
    pipe = StableDiffusionControlNetPipeline.from_pretrained(
        model, controlnet=net, torch_dtype=torch.float32, safety_checker=None
    )
    pipe.set_progress_bar_config(disable=True)
    result = {}
    for kind, wanted in sketches(Artwork(work), count).items():
        scores, shown = [], []
        for start in range(0, count, TOGETHER):
            some = wanted[start : start + TOGETHER]
            images = pipe(
                [prompt for _, prompt in some], image=controlnet.as_condition([lines for lines, _ in some]),
                num_inference_steps=steps, guidance_scale=4.0, height=128, width=128,
                generator=[torch.Generator().manual_seed(start + n) for n in range(len(some))],
            ).images  # fmt: skip
            for (lines, _), image in zip(some, images, strict=True):
                scores.append(edge_f1(canny(np.asarray(image)), lines))
                shown += [Image.fromarray(lines).convert("RGB"), image]
        _contact_sheet(shown[:96], folder / f"{kind}.png")
        result[kind] = float(np.mean(scores))
    return result
