"""An account of faults that were tried: a pytest plugin.

A test of a fault carries its number and a phrase, `@pytest.mark.fault(5, "single bits of weights flipped")`, and takes
the fixture `tally`. It runs `tally.count(1000)` trials: a tenth of them in `make test`, all with `--all-faults`, which
is `make faults`. A trial that fails does not end the test, so that the table counts all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from .page import Line, Page

SHOWN = 5
# Lines of the last run of each test, so that one of them can be run again.
KEPT = Path("build/faults.json")


@dataclass
class Tally:
    """Trials of one test.

    lost    data, a picture or an answer was lost or wrong, an error was untyped, or something hung
    let_in  what had to be refused was taken
    """

    everything: bool
    tried: int = 0
    lost: int = 0
    let_in: int = 0
    failures: list[str] = field(default_factory=list)

    def count(self, full: int) -> int:
        """How many of `full` trials to run now."""
        return full if self.everything else -(-full // 10)

    @contextmanager
    def trial(self, what: object = "", *, refused: bool = False) -> Iterator[None]:
        """Count what is done inside; an assertion or error there is a failure. `refused`: it had to be turned away."""
        self.tried += 1
        try:
            yield
        except (Exception, pytest.fail.Exception) as error:
            self.let_in += refused
            self.lost += not refused
            reason = (str(error).strip().splitlines() or [""])[0]
            self.failures.append(f"{what}: {type(error).__name__}: {reason}"[:500])

    def held(self, trials: int = 1) -> None:
        """Count trials that a test asserts by itself: it is over at the first that fails."""
        self.tried += trials


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption("--all-faults", action="store_true", help="Try faults in full numbers, not a tenth of them.")
    group.addoption("--faults-page", type=Path, metavar="PATH", help="Write the table of faults to this page.")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fault(row, what): tries faults; make faults runs full numbers of them")
    config.stash[_PAGE] = Page()


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    return Tally(bool(request.config.getoption("--all-faults")))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """Fail a test whose trials failed, and hand its figures to the process that writes the table."""
    tally = pyfuncitem.funcargs.get("tally")
    try:
        result = yield
        if tally is not None and tally.failures:
            shown = "\n".join(tally.failures[:SHOWN])
            pytest.fail(f"{len(tally.failures)} of {tally.tried} trials failed:\n{shown}", pytrace=False)
        return result
    finally:
        for mark in pyfuncitem.iter_markers("fault"):
            figures = (1, 0, 0, True) if tally is None else (tally.tried, tally.lost, tally.let_in, tally.everything)
            pyfuncitem.user_properties.append(("fault", (*mark.args, *figures)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """A test that was skipped, or failed before it was called, has its line too."""
    report = yield
    if report.when == "setup" and not report.passed:
        report.user_properties += [("fault", (*mark.args, 0, 0, 0, True)) for mark in item.iter_markers("fault")]
    return report


_PAGE = pytest.StashKey[Page]()


class _Reports:
    """In the process that collects reports: pytest's own, or the one that has xdist's workers."""

    def __init__(self, page: Page, path: Path | None) -> None:
        self.page, self.path = page, path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not (report.when == "call" or (report.when == "setup" and not report.passed)):
            return
        for name, value in report.user_properties:
            if name == "fault":
                row, what, tried, lost, let_in, full = value
                why = re.sub(r"^Skipped: ", "", report.longrepr[2]) if report.skipped else ""
                # A test that ended before its trials were over lost something.
                lost += report.failed and not (lost or let_in)
                if report.skipped and report.when == "call":
                    tried = 0
                self.page.add(Line(row, what, tried, lost, let_in, report.duration, why, full))
                if self.path is not None:
                    # Hours of faults are not lost with the last of them.
                    self.write(self.path)

    def write(self, path: Path) -> None:
        """The page of this run's lines and of those that were run before."""
        whole = Page.read(KEPT)
        whole.lines |= self.page.lines
        whole.keep(KEPT)
        path.write_text(whole.markdown(), "utf-8")


def pytest_sessionstart(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):
        config = session.config
        config.pluginmanager.register(_Reports(config.stash[_PAGE], config.getoption("--faults-page")))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.getoption("--all-faults"):
        terminalreporter.write_line(config.stash[_PAGE].table())
