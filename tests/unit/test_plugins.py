"""A backend and a sampler of one's own: a package with entry points, installed into a folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
from edge_sd.backends.fake import FakeBackend
from edge_sd.sampling.samplers import SAMPLERS, Sampler
from edge_sd.sampling.schedule import NoiseSchedule
from edge_sd.sampling.solvers import sample_euler

class MineBackend(FakeBackend):
    name = "mine"

    def __init__(self):
        super().__init__(devices=("abacus",))

slow = Sampler("slow_euler", "Slow Euler", sample_euler, NoiseSchedule.euler_levels, "", from_sigma=True)
"""
# Draws with both, and says what was refused.
DRAW = """
from dataclasses import replace
from edge_sd import Pipeline, Request
from edge_sd.backends import AllBackends
from edge_sd.backends.fake import fake_bundle
from edge_sd.devices.choose import choose
from edge_sd.pipeline.loader import Components

backends = AllBackends()
bundle = fake_bundle()
bundle = replace(bundle, variants={"mine": replace(bundle.variants["fake"], backend="mine")})
plan = choose(bundle, backends.devices())
pipeline = Pipeline(Components(bundle, plan, backends))
first, second = (pipeline.generate(Request("a cat", seed=1, steps=2, sampler=name)).pictures[0]
                 for name in ("Slow Euler", "euler"))
print(plan.device.name, first.settings.sampler, first.image.tobytes() == second.image.tobytes())
"""


def installed(folder: Path, points: str) -> dict[str, str]:
    """An environment in which a package with these entry points is found."""
    (folder / "mine.py").write_text(CODE)
    (folder / "mine-1.0.dist-info").mkdir()
    (folder / "mine-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (folder / "mine-1.0.dist-info/entry_points.txt").write_text(points)
    return {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


def run(code: str, env: dict[str, str]) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_backend_and_a_sampler_of_ones_own_draw(tmp_path: Path) -> None:
    env = installed(
        tmp_path, "[edge_sd.backends]\nmine = mine:MineBackend\n[edge_sd.samplers]\nslow_euler = mine:slow\n"
    )
    assert run(DRAW, env) == "abacus slow_euler True\n"


@pytest.mark.parametrize(
    ("point", "why"),
    [("mine:nothing", "has no attribute 'nothing'"), ("nowhere:x", "No module named 'nowhere'"),
     ("mine:slow", "'Sampler' object is not callable")],
)  # fmt: skip
def test_a_backend_that_cannot_be_used_is_absent_with_the_reason(tmp_path: Path, point: str, why: str) -> None:
    env = installed(tmp_path, f"[edge_sd.backends]\nmine = {point}\n")
    told = run("from edge_sd.backends import AllBackends; print(AllBackends().absent)", env)
    assert f"the backend 'mine' of {point} cannot be used: " in told
    assert why in told


@pytest.mark.parametrize(
    ("name", "point", "why"),
    [("euler", "mine:slow", "there is one of that name"), ("other", "mine:slow", "it is no Sampler called 'other'"),
     ("other", "mine:CODE", "has no attribute 'CODE'"), ("other", "mine:MineBackend", "it is no Sampler")],
)  # fmt: skip
def test_a_sampler_that_cannot_be_used_is_named_where_one_is_looked_for(
    tmp_path: Path, name: str, point: str, why: str
) -> None:
    env = installed(tmp_path, f"[edge_sd.samplers]\n{name} = {point}\n")
    told = run("""
from edge_sd.errors import InvalidRequest
from edge_sd.sampling.names import find_sampler
print(find_sampler("euler"))
try:
    find_sampler("mine")
except InvalidRequest as error:
    print(error)
""", env)  # fmt: skip
    assert told.startswith("('euler', None)\n")
    assert f"the sampler {name!r} of {point} is not used: " in told
    assert why in told
