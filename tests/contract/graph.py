"""The import graph of edge_sd, converters and apps. `python -m tests.contract.graph` prints its figures by folder."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from graphlib import TopologicalSorter
from itertools import count
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOPS = (("edge_sd", ""), ("converters", "edge_sd."), ("apps", "edge_sd."))
Graph = Mapping[str, set[str]]


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Dotted name -> file, as they are imported when installed."""
    found = {}
    for folder, name in TOPS:
        for path in (root / folder).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            found[name + ".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """The modules among `known` that a file names in imports, wherever they stand in it."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            named = [f"{base}.{alias.name}" for alias in node.names]
            yield from {each if each in known else base for each in named} & {*known}


def import_graph(root: Path = ROOT) -> dict[str, set[str]]:
    """Module -> the modules that it imports."""
    known = modules(root)
    return {name: {*imports(name, path, known)} - {name} for name, path in known.items()}


def reached(graph: Graph, start: str) -> set[str]:
    """Everything that `start` imports, directly or by way of others."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for each in graph[waiting.pop()] - seen:
            seen.add(each)
            waiting.append(each)
    return seen


def entries(graph: Graph, folder: str) -> dict[str, set[str]]:
    """The same graph between the files and folders that lie directly in `folder` ("edge_sd", "edge_sd.apps")."""

    def entry(module: str) -> str:
        return module.removeprefix(f"{folder}.").split(".")[0]

    others = () if folder != "edge_sd" else ("edge_sd.converters", "edge_sd.apps")
    inside = {name for name in graph if name.startswith(f"{folder}.") and not name.startswith(others)}
    between: dict[str, set[str]] = {entry(name): set() for name in inside}
    for name in inside:
        between[entry(name)] |= {entry(target) for target in graph[name] & inside} - {entry(name)}
    return between


def circles(graph: Graph) -> list[set[str]]:
    """Groups of entries each of which imports, in the end, every other of its group."""
    ahead = {name: reached(graph, name) for name in graph}
    groups = {frozenset({name, *(each for each in ahead[name] if name in ahead[each])}) for name in graph}
    return [set(group) for group in groups if len(group) > 1]


def floors(graph: Graph) -> int:
    """Entries in the longest chain of imports; a circle stands on one floor."""
    home = {name: min(group) for group in circles(graph) for name in group}
    flat: dict[str, set[str]] = {}
    for name, targets in graph.items():
        own = home.get(name, name)
        flat.setdefault(own, set()).update({home.get(each, each) for each in targets} - {own})
    sorter = TopologicalSorter(flat)
    sorter.prepare()
    for floor in count():
        ready = sorter.get_ready()
        if not ready:
            return floor
        sorter.done(*ready)
    raise AssertionError


def figures(root: Path = ROOT) -> str:
    """A table: entries, floors, arrows between entries, how many of these lie in a circle, and the circles."""
    graph = import_graph(root)
    rows = [f"{'folder':19} entries  floors  arrows  in circles  circles"]
    for folder in ("edge_sd", "edge_sd.converters", "edge_sd.apps"):
        inside = entries(graph, folder)
        groups = circles(inside)
        arrows = sum(map(len, inside.values()))
        circling = sum(len(inside[name] & group) for group in groups for name in group)
        rows.append(f"{folder:19}{len(inside):>8}{floors(inside):>8}{arrows:>8}{circling:>12}{len(groups):>9}")
    # A package's face imports its rooms lazily; what is inside them does not count as a circle of files.
    files = circles({name: targets - {"edge_sd"} for name, targets in graph.items() if name != "edge_sd"})
    return "\n".join([*rows, f"files: {len(graph)}, circles of files: {len(files)}"])


if __name__ == "__main__":
    print(figures(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT))
