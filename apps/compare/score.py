"""Scores: each picture against the reference's of the same shot, then mean, median and worst."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edge_sd.images.metrics import PEAK, finite, ms_ssim, psnr, ssim

from .clip import Clip, open_clip
from .judge import Judge, Opinion, open_judge, read_prompts
from .measure import Work
from .perceptual import Perceptual, open_perceptual
from .plan import Artist, Comparison, Row, Shot

WORST = 5

METRICS = {
    "latent_psnr": "PSNR of the last latents; the peak is the range (max - min) of the reference's; 100 dB at most",
    "psnr": "PSNR of the 8-bit pictures over all pixels and channels; the peak is 255; equal pictures count as 100 dB",
    "ssim": "SSIM (Wang 2004): Gaussian window of 11 x 11, sigma 1.5, the mean over channels",
    "ms_ssim": "MS-SSIM (Wang 2003): as many of its five scales as fit, weights scaled to 1 (four at 128 pixels)",
    "lpips": "LPIPS 0.1 (Zhang 2018) with AlexNet; 0 is equal, and less is better",
    "agreement": "share of pictures in which the judge names the same concept as in the reference's",
    "clip": "cosine of the vectors that the judge, or CLIP where there is no judge, has for picture and prompt",
}
# For all other metrics, higher is better.
LESS_IS_BETTER = ("lpips",)


class Scorer:
    """Reads pictures once and remembers the judge's opinions."""

    def __init__(self, comparison: Comparison, work: dict[Artist, Work]) -> None:
        self.comparison, self.work = comparison, work
        self.judge, why = open_judge(comparison.bundle)
        prompts = list(dict.fromkeys(shot.prompt for shot in comparison.shots))
        self.prompts = read_prompts(self.judge, prompts) if self.judge else None
        self.notes = [why] if why else []
        if self.judge and self.prompts is None:
            self.notes.append("CLIP score: not measured, since no backend here runs the judge's text encoder")
        self.clip: Clip | None = None
        if self.judge is None:
            self.clip, why = open_clip()
            self.prompts = self.clip.read(prompts) if self.clip else None
            self.notes.append(f"CLIP score: by {self.clip.name}" if self.clip else f"CLIP score: not measured: {why}")
        self.perceptual, why = open_perceptual()
        self.notes += [why] if why else []
        self._opinions: dict[Path, Opinion] = {}

    def score(self, row: Row) -> dict[str, Any]:
        """Figures of `row`'s pictures for the report; {"error": …} where there are none to measure."""
        for artist in (row.artist, row.against):
            if self.work[artist].error:
                whose = "" if artist == row.artist else f"{artist.name}: "
                return {"error": whose + self.work[artist].error}
        alone = row.kind == "reference"
        pictures, curves = [], []
        for shot in self.comparison.shots[: row.count]:
            own = self._path(row.artist, replace(shot, seed=shot.seed + row.shift))
            theirs = self._path(row.against, shot)
            measured: dict[str, Any] = {"shot": shot.stem, "prompt": shot.prompt, "seed": shot.seed}
            if not alone:
                try:
                    measured |= compare_pictures(own, theirs, self.perceptual)
                except ValueError as error:
                    return {"error": str(error)}
                if (curve := divergence(own, theirs)) is not None:
                    curves.append(curve)
            pictures.append(measured | self._judged(own, theirs, shot, alone))
        quality = {
            name: summary([picture[name] for picture in pictures], max if name in LESS_IS_BETTER else min)
            for name in METRICS
            if name in pictures[0]
        }
        result: dict[str, Any] = {"quality": quality, "pictures": pictures}
        if not alone:
            result["worst"] = [p["shot"] for p in sorted(pictures, key=lambda p: p["psnr"])[:WORST]]
        if len(curves) == len(pictures):
            result["divergence"] = [round(float(value), 2) for value in np.mean(curves, axis=0)]
        return result

    def _path(self, artist: Artist, shot: Shot) -> Path:
        return self.work[artist].folder / f"{shot.stem}.png"

    def _judged(self, own: Path, theirs: Path, shot: Shot, alone: bool) -> dict[str, Any]:
        if self.clip and self.prompts:
            with Image.open(own) as image:
                return {"clip": _cosine(self.clip.see(image), self.prompts[shot.prompt])}
        if not self.judge:
            return {}
        mine = self._opinion(self.judge, own)
        found: dict[str, Any] = {"concept": mine.concept}
        if not alone:
            found["agreement"] = float(mine.concept == self._opinion(self.judge, theirs).concept)
        if self.prompts:
            found["clip"] = _cosine(mine.vector, self.prompts[shot.prompt])
        return found

    def _opinion(self, judge: Judge, path: Path) -> Opinion:
        if path not in self._opinions:
            with Image.open(path) as image:
                self._opinions[path] = judge.look(image)
        return self._opinions[path]


def _cosine(picture: NDArray[np.float32], prompt: NDArray[np.float32]) -> float:
    return round(float(picture @ prompt), 3)


def compare_pictures(found: Path, reference: Path, perceptual: Perceptual | None = None) -> dict[str, float]:
    """The metrics of two drawings STEM.png with their STEM.npy. Raises ValueError where they are of other sizes."""
    own, theirs = pixels(found), pixels(reference)
    if own.shape != theirs.shape:
        (h, w, _), (height, width, _) = own.shape, theirs.shape
        raise ValueError(f"it draws {w}x{h} and what it is compared with {width}x{height}; give --size")
    last = [np.load(path.with_suffix(".npy"), mmap_mode="r")[-1] for path in (found, reference)]
    return {
        "latent_psnr": round(finite(psnr(last[0], last[1])), 3),
        "psnr": round(finite(psnr(own, theirs, PEAK)), 3),
        "ssim": round(ssim(own, theirs), 5),
        "ms_ssim": round(ms_ssim(own, theirs), 5),
        **({"lpips": round(perceptual.distance(own, theirs), 5)} if perceptual else {}),
    }


def divergence(found: Path, reference: Path) -> NDArray[np.float64] | None:
    """PSNR of the latents after each step, against the range of the reference's there; None where steps differ."""
    own, theirs = (np.load(path.with_suffix(".npy"), mmap_mode="r") for path in (found, reference))
    if own.shape != theirs.shape:
        return None
    return np.array([finite(psnr(x, y)) for x, y in zip(own, theirs, strict=True)])


def pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def summary(values: Sequence[float], worst: Callable[[Sequence[float]], float] = min) -> dict[str, float]:
    """Mean, its standard error (s / sqrt(n), s with n - 1; 0 for one value), median, worst, n."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return {
        "mean": round(statistics.fmean(values), 4),
        "error": round(error, 4),
        "median": round(statistics.median(values), 4),
        "worst": round(worst(values), 4),
        "count": len(values),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest of the rounds."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}
