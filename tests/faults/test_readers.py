"""Readers of strangers' bytes: what a fuzzer found, and seeds changed at random. Only typed errors come out."""

from __future__ import annotations

import random
import time

import pytest

from .account import Tally
from .fuzz import CORPUS, SLOW, SLOW_MEGABYTE
from .readers import READERS, read, seeds

PIECES = [b"", b"\0", b"\xff", b"[", b"]", b"{", b"}", b'"', b":", b",", b"(", b")", b"null", b"-1", b"1e999", b"NaN",
          b"99999999999999999999", b"\\ud800", b"\n", b"<", b"\xe2\x80\xae", b"true", b"[]", b"{}", b"0"]  # fmt: skip


def changed(data: bytes, rng: random.Random) -> bytes:
    """A few pieces put in, taken out, doubled or flipped."""
    made = bytearray(data)
    for _ in range(rng.randrange(1, 6)):
        at, size = rng.randrange(len(made) + 1), rng.randrange(8)
        kind = rng.randrange(4)
        if kind == 0:
            made[at:at] = rng.choice(PIECES)
        elif kind == 1:
            made[at : at + size] = rng.choice(PIECES)
        elif kind == 2:
            made[at:at] = made[at : at + 20 * size]
        elif at < len(made):
            made[at] ^= 1 << rng.randrange(8)
    return bytes(made)


@pytest.mark.fault(21, "seeds of every reader of strangers' bytes, changed at random, and what a fuzzer found")
@pytest.mark.parametrize("name", READERS)
def test_only_typed_errors_come_out(name: str, tally: Tally) -> None:
    pytest.importorskip({"template": "dynamicprompts", "openai_request": "fastapi", "a1111_request": "fastapi",
                         "job": "fastapi", "graph": "openvino"}.get(name, "numpy"))  # fmt: skip
    rng, kept = random.Random(name), list(seeds(name))
    # The first of all imports what it needs.
    read(name, kept[0])
    found = [path.read_bytes() for path in sorted((CORPUS / name).glob("*"))]
    for data in [*kept, *found, *(changed(rng.choice(kept), rng) for _ in range(tally.count(2000)))]:
        started = time.thread_time()
        with tally.trial(data[:200]):
            read(name, data)
            assert time.thread_time() - started < SLOW + SLOW_MEGABYTE * len(data) / 1e6
