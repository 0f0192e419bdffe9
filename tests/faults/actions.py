"""What the forked processes of zygote.py do that is no command of `edge-sd` as it is."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any


def convert(source: str, target: str, precision: str = "fp16") -> None:
    """A conversion that computes nothing: components are bytes that the library would have written.

    What is written, flushed and renamed around them is what the conversion always does.
    """
    import numpy as np

    from edge_sd.bundle.variants import Parity
    from edge_sd.converters import build
    from edge_sd.converters.form import Made
    from edge_sd.converters.recipes import RECIPES
    from edge_sd.files import record_file

    def part(_: Any, form: Any, recipe: Any, name: str, staging: Path, *rest: Any) -> Any:
        (staging / name).mkdir(exist_ok=True)
        graph, weights = f"{name}/openvino_model.xml", f"{name}/openvino_model.bin"
        (staging / graph).write_text(f"<net name='{name}'/>\n" * 100)
        with (staging / weights).open("wb") as file:
            for _ in range(8):
                file.write(random.Random(name).randbytes(200_000))
        files = {each: asdict(record_file(staging / each)) for each in (graph, weights)}
        made = Made((name,), graph, (weights,), ("x",), ("y",))
        row = {"made": asdict(made), "parity": asdict(Parity(99.0, 0.0)), "files": files}
        return row, [{"picture": np.zeros((1, 3, 64, 64), np.float32)}]

    _stand_in(part)
    build.build(source, Path(target), "openvino", RECIPES[precision], lambda what, share: None)


def run(made: str, *words: str) -> None:
    """`edge-sd run` whose conversion computes nothing: its components are those of the bundle `made`."""
    import shutil
    import sys

    import numpy as np

    from edge_sd.apps.cli import main
    from edge_sd.bundle.bundle import read_manifest
    from edge_sd.converters.form import Made

    bundle = read_manifest(Path(made))
    ((title, variant),) = bundle.variants.items()

    def part(_: Any, form: Any, recipe: Any, name: str, staging: Path, *rest: Any) -> Any:
        artifact, files = variant.artifacts[name], {}
        for each in (artifact.graph, *artifact.weights):
            place = staging / each.removeprefix(f"{title}/")
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(bundle.path(each), place)
            files[each.removeprefix(f"{title}/")] = asdict(variant.files[each])
        graph, *weights = files
        row = Made((name,), graph, tuple(weights), artifact.inputs, artifact.outputs)
        parity = {"psnr": 99.0, "max_error": 0.0}
        return {"made": asdict(row), "parity": parity, "files": files}, [
            {"picture": np.zeros((1, 3, 16, 16), np.float32)}
        ]

    _stand_in(part)
    sys.argv = ["edge-sd", "run", *words]
    main()


def _stand_in(part: Any) -> None:
    """Let `part` make the components of all conversions of this process."""
    from edge_sd.converters import build
    from edge_sd.converters.openvino import convert as openvino

    def tokenizer(_: Path, staging: Path) -> None:
        (staging / "openvino_tokenizer.xml").write_text(json.dumps({"x": "y" * 50_000}))

    build._make_part, openvino.convert_tokenizer = part, tokenizer


def install(home: str) -> None:
    """`edge-sd macos install` as on a Mac."""
    from edge_sd.apps.macos.install import install

    install(Path(home), "/usr/bin/python3")


def remember(model: str) -> None:
    """Keep a measurement, as `edge-sd tune` does with each."""
    from edge_sd.backends.base import Device
    from edge_sd.bundle.bundle import ModelBundle
    from edge_sd.devices.measurements import Measured, remember
    from edge_sd.machine import this_machine

    row = ("unet", "openvino-fp16", "openvino:cpu")
    remember(
        ModelBundle.open(model),
        [Device("cpu", "openvino", "a processor")],
        this_machine(),
        {row: Measured(1.0, 2.0, 50.0)},
    )


def publish(work: str, target: str, word: str) -> None:
    """`edge-sd train publish` whose weights are made up: every file says `word`."""
    from edge_sd.converters.training import publish

    def write(_: Path, folder: Path, report: object) -> None:
        for name in ("unet/weights", "vae/weights", "edge_sd.json"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(word)

    publish._write = write
    publish.publish(Path(work), Path(target))


def convert_on_small_disk(source: str, base: str, place: str, size: int) -> None:
    """Mount `size` bytes of memory at `place`, put the bundle `base` there, and convert into it; the process is in a
    mount namespace of its own. Prints what was said, and the names of variants and files afterwards, as JSON."""
    import shutil
    import subprocess

    from edge_sd.bundle.bundle import ModelBundle
    from edge_sd.converters import build
    from edge_sd.errors import ConversionError

    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place], check=True)
    target = Path(place) / "b"
    shutil.copytree(base, target)
    # Up front it would be refused.
    build._check_space = lambda *_: None
    said = ""
    try:
        convert(source, str(target))
    except ConversionError as error:
        said = str(error)
    bundle = ModelBundle.open(target)
    names = sorted(path.relative_to(target).as_posix() for path in target.rglob("*"))
    print(json.dumps({"said": said, "variants": sorted(bundle.variants), "problems": bundle.verify(), "names": names}))


if __name__ == "__main__":
    import sys

    convert_on_small_disk(*sys.argv[1:4], int(sys.argv[4]))
