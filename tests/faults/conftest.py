"""Processes whose calls fail, for the tests of this folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .interrupted import Commands, build_library

CONVERSION = ("safetensors", "filelock", "PIL.PngImagePlugin", "edge_sd.converters.build",
              "edge_sd.converters.openvino.convert", "edge_sd.apps.cli")  # fmt: skip


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if sys.platform != "linux":
        pytest.skip("calls are counted by LD_PRELOAD, which is Linux's")
    try:
        return build_library(tmp_path_factory.mktemp("interrupt"))
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no C compiler ({error})")


@pytest.fixture(scope="session")
def weights(emoji: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model's plain weights, as a source."""
    target = tmp_path_factory.mktemp("weights") / "emoji"
    ignored = shutil.ignore_patterns(
        "controlnet", "vae_tiny", "openvino-*", "coreml-*", "lcm", "evaluator", "*.png", "edge_sd.json"
    )
    shutil.copytree(emoji, target, ignore=ignored)
    return target


@pytest.fixture(scope="module")
def conversions(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with Commands(tmp_path_factory.mktemp("commands"), library, CONVERSION) as commands:
        yield commands


@pytest.fixture(scope="module")
def commands(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    # Not the hub's library: it looks at the environment when it is imported.
    modules = ("edge_sd.apps.cli", "filelock", "PIL.PngImagePlugin", "openvino", "edge_sd.pipeline.pipeline",
               "edge_sd.converters.training.publish", "edge_sd.apps.macos.install")  # fmt: skip
    with Commands(tmp_path_factory.mktemp("commands"), library, modules) as commands:
        yield commands
