"""What README, docs and --help show is true: commands and Python run, options and files exist, links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image

from edge_sd.apps.cli import app

ROOT = Path(__file__).parents[2]
REPOSITORY = re.compile(
    r"https://(?:github\.com/edge-sd/edge-sd/(?:blob|tree)|raw\.githubusercontent\.com/edge-sd/edge-sd)/main/"
)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = [
    ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "examples/README.md", "edge_sd/models/emoji/README.md")
]
# What a command holds that can't run here -> the test that runs it with something of its own.
ELSEWHERE = {
    "--to coreai": "tests/parity/test_coreai.py",
    "--device coreai-reference": "tests/parity/test_coreai.py",
    "edge-sd train": "tests/e2e/test_training.py",
    "edge-sd compare autoencoder": "tests/e2e/test_training.py",
    "edge-sd compare sweep": "tests/e2e/test_compare.py",
    "--model XL": "tests/parity/test_families.py",
    "edge-sd run": "tests/e2e/test_run.py",
    "ORG/NAME": "tests/e2e/test_hub.py",
    "model.safetensors": "tests/parity/test_checkpoints.py",
    "--vae FOLDER": "tests/parity/test_parts.py",
    "klein-4b.safetensors": "tests/parity/test_single_files.py",
    ".gguf": "tests/unit/test_gguf.py",
    "--model KLEIN": "tests/parity/test_references.py",
    "compare suggest": "tests/unit/test_mixture.py",
    "--ip-adapter": "tests/parity/test_ip_adapter.py",
    "--reference-weight": "tests/parity/test_ip_adapter.py",
    "edge-sd serve": "tests/e2e/test_server_openai.py",
    "edge-sd desktop": "tests/e2e/test_desktop.py",
    "edge-sd mcp": "tests/e2e/test_mcp.py",
    "--dask": "tests/e2e/test_cluster.py",
    "edge-sd macos": "tests/unit/test_macos.py",
    # By Apple's runtime on a CPU it takes a minute.
    "edge-sd doctor": "tests/e2e/test_machine_commands.py",
}


def code_lines(page: Path) -> Iterator[str]:
    """Lines of fenced or indented code, as they are."""
    fence = None
    for line in page.read_text("utf-8").splitlines():
        if line.startswith("```"):
            fence = None if fence is not None else line[3:]
        elif fence is not None or line.startswith("    "):
            yield line


def commands() -> list[str]:
    """The commands of all pages, each once, less those that run elsewhere."""
    found = [line.strip().split("  #")[0].strip() for page in PAGES for line in code_lines(page)]
    ours = [line for line in found if line.startswith("edge-sd ") and not any(part in line for part in ELSEWHERE)]
    return list(dict.fromkeys(ours))


def every_command(command: Any = None, context: Any = None, path: str = "edge-sd") -> Iterator[tuple[str, Any, Any]]:
    """(words, command, context) of the command line and all that is below it."""
    if command is None:
        command = typer.main.get_command(app)
        context = command.make_context("edge-sd", [], resilient_parsing=True)
    yield path, command, context
    for name, child in getattr(command, "commands", {}).items():
        yield from every_command(child, type(context)(child, parent=context, info_name=name), f"{path} {name}")


OPTIONS = {option for _, command, _ in every_command() for each in command.params for option in
           (*each.opts, *each.secondary_opts)} | {"--help"}  # fmt: skip


def run(command: str, folder: Path) -> None:
    home = {**os.environ, "EDGE_SD_MODELS": str(folder / "home/models"), "XDG_CACHE_HOME": str(folder / "home/cache")}
    done = subprocess.run(
        [sys.executable, "-m", "edge_sd", *shlex.split(command)[1:]], cwd=folder, capture_output=True, text=True,
        env=home,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_pages_have_commands() -> None:
    assert 'edge-sd generate "a red apple, glossy style" --seed 7 --output apple.png' in commands()
    for part, test in ELSEWHERE.items():
        assert (ROOT / test).is_file(), f"commands with {part!r} are run by {test}, which does not exist"


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_pages_runs(command: str, tmp_path_factory: pytest.TempPathFactory, shallow: Path) -> None:
    folder = tmp_path_factory.getbasetemp() / "pages"
    folder.mkdir(exist_ok=True)
    for name in ("photo.jpg", "mask.png", "star.png"):
        Image.effect_noise((64, 64), 80).save(folder / name)
    (folder / "prompts.csv").write_text("prompt,seed\na red apple,7\n")
    if command.startswith("edge-sd compare emoji"):
        command += " --steps 2 --rounds 1"  # The same way in a tenth of the time.
    run(command.replace("SOURCE", str(shallow)), folder)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    for example in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
        subprocess.run([sys.executable, "-c", example], cwd=tmp_path, check=True)


def test_the_examples_of_help_run(tmp_path: Path, shallow: Path) -> None:
    texts = [text for _, command, _ in every_command() for text in (command.help, command.epilog) if text]
    examples = [line for text in texts for line in re.findall(r"(?:Example|download): (edge-sd .*)", text)]
    # Commands that a page also has are run by the page's test.
    alone = [line for line in examples if line not in commands() and not any(part in line for part in ELSEWHERE)]
    assert len(examples) > 5
    assert alone
    for example in alone:
        run(example, tmp_path)


def test_every_command_has_its_place_in_the_pages() -> None:
    everything = "".join(page.read_text("utf-8") for page in PAGES)
    leaves = [path for path, command, _ in every_command() if not getattr(command, "commands", {})]
    # The stages of training are one list; `compare run` is what `compare` is.
    leaves = [path for path in leaves if not path.startswith("edge-sd train")]
    assert not [
        path
        for path in leaves
        if path not in everything.replace("edge-sd compare", "edge-sd compare run edge-sd compare")
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_of_a_page_is_an_option(page: Path) -> None:
    lines = re.findall(r"^\| `--.*?\|", page.read_text("utf-8"), re.MULTILINE)
    lines += [line for line in code_lines(page) if line.strip().startswith("edge-sd ")]
    for line in lines:
        assert {*re.findall(r"(?<![\w-])--[a-z][a-z-]*", line.split("  #")[0])} <= OPTIONS, line


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^) ]+)\)", REPOSITORY.sub("REPOSITORY/", page.read_text("utf-8"))):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = ROOT / path.removeprefix("REPOSITORY/") if path.startswith("REPOSITORY/") else page.parent / path
        target = target if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", each).strip().lower().replace(" ", "-") for each in headings}, link


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    named = re.findall(r"`((?:edge_sd|converters|apps|tests|examples|docs)/[\w./-]*)`", page.read_text("utf-8"))
    assert not [path for path in named if not (ROOT / path).exists()]


def test_the_readme_is_for_the_first_ten_minutes() -> None:
    text = PAGES[0].read_text("utf-8")
    assert len(text.splitlines()) < 200
    # A package index shows it without the repository around it.
    assert not [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]


def test_the_pages_of_the_navigation_exist() -> None:
    config = (ROOT / "mkdocs.yml").read_text("utf-8")
    named = re.findall(r"[\w-]+\.md", config.split("nav:")[1].split("theme:")[0])
    assert not [name for name in named if not (ROOT / "docs" / name).is_file()]
    assert len(named) == len({*named})
