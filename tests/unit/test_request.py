"""What may be asked for, and the line that says why something may not."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import pytest

from edge_sd.backends.fake import fake_bundle
from edge_sd.errors import InvalidRequest
from edge_sd.pipeline.request import MAX_SEED, Request


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": ""}, "empty"),
        ({"prompt": " \n\t"}, "empty"),
        ({"prompt": "\udcff"}, "not valid UTF-8"),
        ({"prompt": "a\0b"}, "NUL"),
        ({"prompt": "a" * 20_001}, "20001 characters"),
        ({"negative": "\ud800"}, "negative prompt is not valid UTF-8"),
        ({"width": 100}, "width 100 is not a multiple of 8"),
        ({"height": 0}, "height 0"),
        ({"height": -8}, "height -8"),
        ({"width": 20_000}, "8 to 16384"),
        ({"steps": 0}, "steps 0"),
        ({"steps": 1001}, "1 to 1000"),
        ({"guidance": math.nan}, "guidance nan"),
        ({"guidance": math.inf}, "guidance inf"),
        ({"guidance": -1.0}, "guidance -1.0"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**32}, "seed 4294967296"),
        ({"seed": MAX_SEED, "count": 2}, "past the last seed"),
        ({"count": 0}, "count 0"),
        ({"sampler": "best"}, "valid: ddim, dpmpp_2m"),
    ],
)
def test_nonsense_is_refused_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        Request(**{"prompt": "a cat", **values})
    assert "\n" not in str(caught.value)


def test_the_models_defaults_fill_what_is_not_said() -> None:
    settings = Request("a cat", steps=7).resolve(fake_bundle().defaults, seed=11)
    assert (settings.width, settings.height, settings.steps, settings.sampler, settings.seed) == (
        64,
        64,
        7,
        "euler",
        11,
    )
    assert Request(**asdict(settings)).resolve(fake_bundle().defaults, seed=0) == settings
