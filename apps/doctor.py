"""The doctor: versions, devices, caches, and one picture per device compared with torch float32's.

Each picture is drawn by `edge-sd generate` in a process of its own, as a user would: a driver that crashes is a line of
the report, and the command is there to be run again. The home folder, which names its user, is a ~ in it.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_sd import __version__
from edge_sd.backends import Device
from edge_sd.bundle.bundle import ModelBundle
from edge_sd.caches import CACHES
from edge_sd.devices.choose import choose
from edge_sd.devices.discovery import Here, discover
from edge_sd.errors import EdgeSDError
from edge_sd.images.metrics import PEAK, psnr
from edge_sd.paths import models_home
from edge_sd.pipeline.recorded import read_recorded

from .terminal import Watch

PACKAGES = ("numpy", "pillow", "tokenizers", "openvino", "coremltools", "coreai-core", "torch", "diffusers",
            "transformers", "nncf")  # fmt: skip
# The picture must reach this share of its worst component's PSNR: errors of components add up.
SHARE = 0.6


@dataclass(frozen=True)
class SelfTest:
    """One device's picture.

    result   "identical", "close", "off", "failed", "drawn" (there was nothing to hold it beside) or "not run"
    psnr     dB beside torch float32's, peak 255; None where they are identical or one is missing
    pixels   the first ten hex digits of the sha256 of the pixels
    """

    device: str
    backend: str
    variant: str = ""
    result: str = "not run"
    why: str = ""
    psnr: float | None = None
    wanted: float | None = None
    pixels: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    command: str = ""

    @property
    def sound(self) -> bool:
        return self.result not in ("off", "failed")

    def line(self) -> str:
        told = f"{self.psnr:.1f} dB beside torch float32 (at least {self.wanted:.0f} wanted)" if self.psnr else self.why
        took = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.seconds.items())
        place = f"{self.device} ({self.backend})"
        return f"{place:28} {self.result:10} {', '.join(filter(None, [self.variant, told, took, self.pixels]))}"


@dataclass(frozen=True)
class Report:
    """All that the doctor found."""

    versions: dict[str, str]
    here: Here
    caches: list[dict[str, Any]]
    model: dict[str, Any]
    tests: list[SelfTest]

    @property
    def sound(self) -> bool:
        return not self.model["problems"] and all(test.sound for test in self.tests)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        tests = [asdict(test) for test in self.tests]
        return {"sound": self.sound, "versions": self.versions, **self.here.as_dict(), "caches": self.caches,
                "model": self.model, "tests": tests}  # fmt: skip

    def text(self) -> str:
        """For people, and for pasting."""
        lines = ["versions          " + ", ".join(f"{name} {number}" for name, number in self.versions.items())]
        lines += self.here.lines()
        for cache in self.caches:
            lines.append(f"cache             {cache['path']}: {cache['files']} files, {cache['bytes'] / 1e6:.1f} MB")
        variants = ", ".join(f"{name} {hash_}" for name, hash_ in self.model["variants"].items())
        lines.append(f"model             {self.model['name']}: {variants}")
        lines += [f"damaged           {problem}" for problem in self.model["problems"]]
        lines += ["", *(test.line() for test in self.tests)]
        again = [test.command for test in self.tests if not test.sound]
        lines += ["", *(f"again: {command}" for command in again)] if again else []
        return "\n".join([*lines, "", "all is well" if self.sound else "something is off, see above"])


def examine(model: str, seconds: float, watch: Watch = lambda what, share: None) -> Report:
    """Look at everything; each picture may take `seconds`. Raises ModelNotFound or InvalidModel, nothing else.

    watch   is told which device draws, and the share of the devices that have drawn
    """
    bundle, here = ModelBundle.open(model), discover()
    problems = _problems(bundle)
    # Damaged files would fail everywhere, which tells nothing about a device.
    tests = []
    for n, device in enumerate([] if problems else here.devices):
        watch(f"drawing on {device.name}", n / len(here.devices))
        tests.append(_test(bundle, model, here, device, seconds))
    hashes = {name: bundle.fingerprint(name) for name in sorted(bundle.variants)}
    facts = {"name": bundle.name, "family": bundle.facts.family, "variants": hashes, "problems": problems}
    return Report(_versions(), here, _caches(), facts, tests)


def _problems(bundle: ModelBundle) -> list[str]:
    found: dict[str, None] = {}
    for name in bundle.variants:
        try:
            bundle.check(name)
        except EdgeSDError as error:
            found[str(error)] = None
    return list(found)


def _versions() -> dict[str, str]:
    found = {"edge-sd": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _caches() -> list[dict[str, Any]]:
    rows = []
    for folder in (models_home(), *(cache.folder() for cache in CACHES)):
        files = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
        sizes = sum(path.stat().st_size for path in files)
        rows.append({"path": _private(folder), "files": len(files), "bytes": sizes})
    return rows


def _private(path: Path) -> str:
    """`path` without the user's name in it."""
    try:
        return f"~/{path.absolute().relative_to(Path.home()).as_posix()}"
    except ValueError:
        return path.as_posix()


def _test(bundle: ModelBundle, model: str, here: Here, device: Device, seconds: float) -> SelfTest:
    """Draw with the best variant of the UNet that `device` can run, on that device only."""
    others = [each for each in here.devices if each.backend == device.backend]
    try:
        plan = choose(bundle, others, device.name, machine=here.machine, preference="quality")
    except EdgeSDError as error:
        return SelfTest(device.name, device.backend, why=str(error))
    reference = _reference(bundle, plan.variant)
    words = ["edge-sd", "generate", *_request(reference), "--variant", plan.variant, "--device", device.name]
    shown = _private(Path(model)) if Path(model).is_dir() else model
    test = SelfTest(device.name, device.backend, plan.variant, command=shlex.join([*words, "--model", shown]))
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "picture.png"
        command = [sys.executable, "-m", "edge_sd", *words[1:], "--model", model, "--json", "--output", str(picture)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return replace(test, result="failed", why=f"no picture within {seconds:g} s")
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            return replace(test, result="failed", why=f"{lines[-1]} (exit code {done.returncode})")
        took = json.loads(done.stdout)["seconds"]
        test = replace(test, seconds={name: round(value, 3) for name, value in took.items()})
        # What the worst component is expected to have, of what was measured when it was converted.
        costs = [placement.cost.quality for placement in plan.parts.values()]
        return _compared(test, picture, reference, round(SHARE * min(costs), 1))


def _reference(bundle: ModelBundle, variant: str) -> Path | None:
    """The torch float32 reference: the variant's own, else one of a variant with equal defaults."""
    steps = bundle.defaults_of(variant)
    others = (name for name in sorted(bundle.variants) if bundle.defaults_of(name) == steps)
    return next((found for name in (variant, *others) if (found := bundle.reference(name))), None)


def _request(reference: Path | None) -> list[str]:
    """Command-line arguments for the picture of `reference`, or for a default picture without one."""
    if reference is None:
        return ["a red apple, glossy style", "--seed", "0", "--steps", "4"]
    request = read_recorded(reference).settings
    options = {name: str(request[name]) for name in ("seed", "steps", "sampler", "guidance")}
    options["size"] = f"{request['width']}x{request['height']}"
    return [request["prompt"], *(word for name, value in options.items() for word in (f"--{name}", value))]


def _compared(test: SelfTest, picture: Path, reference: Path | None, wanted: float) -> SelfTest:
    found = _pixels(picture)
    test = replace(test, pixels=hashlib.sha256(found.tobytes()).hexdigest()[:10])
    if reference is None:
        return replace(test, result="drawn", why="the model has no picture of torch's to hold it beside")
    expected = _pixels(reference)
    if np.array_equal(found, expected):
        return replace(test, result="identical")
    decibels = round(psnr(found, expected, PEAK), 2)
    return replace(test, result="close" if decibels >= wanted else "off", psnr=decibels, wanted=wanted)


def _pixels(path: Path) -> NDArray[np.uint8]:
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
