"""The server under a steady load, and stopped in the midst of one: what `edge-sd bench serving` measures."""

from __future__ import annotations

import pytest

from edge_sd.apps.bench import load
from edge_sd.apps.bench.served import serving

pytest.importorskip("fastapi")
MINUTES = 10
# MB that memory may differ by from one tenth of five minutes to another; a leak of 2 kB a picture would be more.
STEADY = 8


@pytest.mark.long
def test_eight_clients_for_ten_minutes() -> None:
    with serving() as server:
        health, errors, memory, unended = load.steady(server, 60.0 * MINUTES)
    assert health["value"] < 100, health["what"]
    assert errors["value"] == 0, errors["errors"]
    assert memory["value"] < STEADY
    assert unended["value"] == 0, unended["what"]


@pytest.mark.fault(25, "serve told to stop while it draws and eight clients wait; the next one draws what was open")
def test_what_is_open_when_the_server_stops_is_drawn_by_the_next() -> None:
    ended, lost, silent = load.stopped()
    assert ended["value"] == 0
    assert "(1 in the midst)" in lost["what"], "a job was drawn when the signal came"
    assert lost["value"] == 0, lost["lost"]
    assert silent["value"] == 0, silent["answers"]
