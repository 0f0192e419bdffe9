"""Hooks of mkdocs: pages link to files of the repository as they do on GitHub, and no page is left out.

A link such as ../edge_sd/models/emoji/samples.png leads out of docs/. On GitHub it works as it is; for the site a
picture is copied beside the pages, and any other file becomes a link to the repository.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)")
PICTURES = (".png", ".jpg", ".webp", ".svg")
PUBLIC_NAMES, OPTIONS = "<!-- public names -->", "<!-- options -->"


def on_config(config: Any) -> Any:
    """Append the pages that the navigation does not name, so that a new page needs no entry."""
    named = set(re.findall(r"[\w-]+\.md", str(config.nav)))
    config.nav += sorted(page.name for page in Path(config.docs_dir).glob("*.md") if page.name not in named)
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pictures outside docs/ that pages show."""
    for page in files.documentation_pages():
        for path in OUTSIDE.findall(page.content_string):
            if path.endswith(PICTURES) and path not in files.src_uris:
                files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Rewrite the links that lead out of docs/, and list the public names in the reference."""

    def moved(link: re.Match[str]) -> str:
        path = link[1]
        if not (ROOT / path).exists():
            raise ValueError(f"{page.file.src_path} links to {path}, which is not in the repository")
        return f"]({path}" if path in files.src_uris else f"]({config.extra['repository']}/blob/main/{path}"

    markdown = OUTSIDE.sub(moved, markdown)
    for mark, made in ((PUBLIC_NAMES, public_names), (OPTIONS, option_tables)):
        if mark in markdown:
            markdown = markdown.replace(mark, made())
    return markdown


def public_names() -> str:
    """One mkdocstrings block for each name in edge_sd.__all__, by where it is defined; errors come last."""
    import edge_sd

    groups: dict[str, list[str]] = {"Classes": [], "Functions": [], "Errors": []}
    for name in edge_sd.__all__:
        public = getattr(edge_sd, name)
        # The version is a text and needs no section.
        if not hasattr(public, "__qualname__"):
            continue
        kind = "Functions" if not isinstance(public, type) else "Classes"
        kind = "Errors" if isinstance(public, type) and issubclass(public, BaseException) else kind
        options = f'    options:\n      heading: "{name}"\n      toc_label: "{name}"\n'
        groups[kind].append(f"::: {public.__module__}.{public.__qualname__}\n{options}")
    return "\n".join(f"## {kind}\n\n" + "\n".join(blocks) for kind, blocks in groups.items() if blocks)


def option_tables() -> str:
    """The fields of Request and Control by group, with range and default, as Markdown tables."""
    from edge_sd.pipeline.control import Control
    from edge_sd.pipeline.options import options
    from edge_sd.pipeline.request import Request, Shared

    # A dataclass lists inherited fields first; the prompt should be.
    inherited = {name for name, _, _ in options(Shared)}
    rows: dict[str, list[str]] = {}
    for owner in (Request, Control):
        for name, option, default in sorted(options(owner), key=lambda row: row[0] in inherited):
            shown = option.default or ("" if default in (None, "", ()) else f"`{default!r}`")
            row = f"| `{owner.__name__}.{name}` | {option.help} | {option.kind.range} | {shown} |"
            rows.setdefault(option.group, []).append(row)
    head = "| field | what it does | range | default |\n| --- | --- | --- | --- |\n"
    return "\n\n".join(f"## {group}\n\n{head}" + "\n".join(each) for group, each in rows.items())
