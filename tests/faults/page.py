"""The page of faults: a table of what was tried, survived, lost and let in, as `make faults` writes it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

HEAD = """# Faults

Written by `make faults`, which tries each of these faults for real: processes are killed, calls of the system fail,
bits are flipped, memory is limited, the network is taken away. `make test` runs a tenth of them. A trial survives when
the old state or the new one is there, whole, or when what is damaged or hostile was refused by a typed error. *Lost*
are trials after which something was missing, wrong or not typed; *let in* are trials in which something was taken that
had to be refused. Both have to be 0.

"""
FOOT = """
A line is a test that carries `@pytest.mark.fault`, as it was last run, in several runs where that took too long for
one; a line says where a tenth was tried. The same test in full numbers is
`python -m pytest --all-faults -k NAME`. Conversions that are killed write bytes in place of what OpenVINO would make,
so that each takes a second; `tests/e2e/test_conversion.py` kills whole ones. What was not tried: Windows and macOS,
disks that lie about `fsync`, and drivers of GPUs and NPUs.
"""


@dataclass(frozen=True)
class Line:
    """One test's trials; `skipped` is why it did not run, `full` whether the numbers were not a tenth."""

    row: int
    what: str
    tried: int
    lost: int
    let_in: int
    seconds: float
    skipped: str = ""
    full: bool = True


@dataclass
class Page:
    lines: dict[tuple[int, str], Line] = field(default_factory=dict)

    def add(self, line: Line) -> None:
        """Add a test's line; the cases of one test are summed."""
        key = line.row, line.what
        known = self.lines.get(key)
        if known is not None:
            line = replace(
                line,
                tried=known.tried + line.tried,
                lost=known.lost + line.lost,
                let_in=known.let_in + line.let_in,
                seconds=known.seconds + line.seconds,
                skipped=known.skipped and line.skipped,
            )
        self.lines[key] = line

    @classmethod
    def read(cls, path: Path) -> Page:
        """What `keep` wrote; an empty page where there is none."""
        if not path.is_file():
            return cls()
        return cls({(line.row, line.what): line for line in (Line(**row) for row in json.loads(path.read_text()))})

    def keep(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps([asdict(line) for line in self.lines.values()], indent=1))

    def table(self) -> str:
        return "\n".join(self._rows())

    def markdown(self) -> str:
        machine = f"{platform.system()}, {os.cpu_count()} cores, Python {platform.python_version()}"
        return f"{HEAD}{machine}, OpenVINO {version('openvino')}, PyTorch {version('torch')}.\n\n{self.table()}\n{FOOT}"

    def _rows(self) -> Iterator[str]:
        yield "| row | what was tried | tried | survived | lost | let in | seconds |"
        yield "| --- | --- | --- | --- | --- | --- | --- |"
        for line in sorted(self.lines.values(), key=lambda each: (each.row, each.what)):
            if line.skipped and not line.tried:
                yield f"| {line.row} | {line.what} | not run: {line.skipped} | | | | |"
                continue
            survived = max(0, line.tried - line.lost - line.let_in)
            share = "" if line.full else " (a tenth)"
            figures = f"{line.tried:,}{share} | {survived:,} | {line.lost:,} | {line.let_in:,} | {line.seconds:.0f}"
            yield f"| {line.row} | {line.what} | {figures} |"
        every = self.lines.values()
        tried, lost, let_in = (sum(getattr(each, name) for each in every) for name in ("tried", "lost", "let_in"))
        yield f"| | in all | {tried:,} | {max(0, tried - lost - let_in):,} | {lost:,} | {let_in:,} | |"
