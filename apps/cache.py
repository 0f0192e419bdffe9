"""`edge-sd cache show` and `clear`: what edge-sd keeps that it can make again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import AsJson
from .terminal import say, say_json

if TYPE_CHECKING:
    from edge_sd.caches import Cache

app = typer.Typer(no_args_is_help=True, help="What is kept that can be made again: compiled graphs, measurements, …")


@app.command("show")
def show(as_json: AsJson = False) -> None:
    """Where caches lie, and how many bytes each has."""
    from edge_sd.caches import CACHES
    from edge_sd.paths import cache_home

    rows = [row for cache in CACHES for row in _rows(cache)]
    if as_json:
        shown = [{**row, "folder": str(row["folder"])} for row in rows]
        say_json({"folder": str(cache_home()), "caches": shown})
        return
    say(cache_home())
    for row in rows:
        where = f"; in {row['folder']}, of an earlier version" if row["earlier"] else ""
        say(f"{row['name']:10} {_amount(row['entries'], row['bytes']):>24}  {row['about']}{where}")


@app.command("clear")
def clear(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]…", help="Which (edge-sd cache show). Default: all.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Remove what is kept. Models, pictures and the server's history are not touched."""
    from edge_sd.caches import CACHES
    from edge_sd.errors import InvalidRequest, OutputError, choices
    from edge_sd.files import remove

    known = {cache.name: cache for cache in CACHES}
    if unknown := [name for name in names or () if name not in known]:
        raise InvalidRequest(f"no cache {unknown[0]!r}; valid: {choices(known)}")
    removed = []
    for name in dict.fromkeys(names or known):
        for row in _rows(known[name]):
            for path in known[name].entries(row["folder"]):
                try:
                    remove(path)
                except OSError as error:
                    raise OutputError(f"{path} could not be removed ({error.strerror or error})") from error
            removed.append(row)
    if as_json:
        say_json([{**row, "folder": str(row["folder"])} for row in removed])
        return
    for row in removed:
        if row["entries"]:
            say(f"{row['name']}: {_amount(row['entries'], row['bytes'])} removed from {row['folder']}")
    if not any(row["entries"] for row in removed):
        say("there was nothing to remove")


def _rows(cache: Cache) -> list[dict[str, Any]]:
    """What a cache has, in its folder and, if there is any, where earlier versions kept it."""
    here, before = cache.folder(), cache.folder_before()
    rows = [_row(cache, here, False)]
    if before is not None and before != here and (earlier := _row(cache, before, True))["entries"]:
        rows.append(earlier)
    return rows


def _row(cache: Cache, folder: Path, earlier: bool) -> dict[str, Any]:
    from edge_sd.caches import size

    entries = cache.entries(folder)
    return {"name": cache.name, "about": cache.about, "folder": folder, "earlier": earlier, "entries": len(entries),
            "bytes": sum(map(size, entries))}  # fmt: skip


def _amount(entries: int, size: int) -> str:
    return f"{entries} {'entry' if entries == 1 else 'entries'}, {size / 1e6:.1f} MB"
