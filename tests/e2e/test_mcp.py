"""`edge-sd mcp`, spoken to by the official client: over standard input and output, and over HTTP."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from edge_sd import Pipeline, Request

mcp = pytest.importorskip("mcp")
httpx2 = pytest.importorskip("httpx2")
from mcp.client.streamable_http import streamable_http_client  # noqa: E402

TOKEN = "a token of sixteen".replace(" ", "-")


def server(folder: Path) -> Any:
    return mcp.StdioServerParameters(
        command=sys.executable, args=["-m", "edge_sd", "mcp", "--folder", str(folder), "--model", "emoji"]
    )


def rows(answer: Any) -> list[dict[str, Any]]:
    assert not answer.is_error, answer.content
    found: list[dict[str, Any]] = json.loads(answer.content[0].text)
    return found


def image(answer: Any) -> Image.Image:
    assert answer.content[1].type == "image"
    return Image.open(BytesIO(base64.b64decode(answer.content[1].data)))


def said(answer: Any) -> str:
    assert answer.is_error
    return str(answer.content[0].text)


def test_an_agent_draws_looks_edits_and_compares(tmp_path: Path) -> None:
    """A real process over standard input and output."""
    told: list[tuple[float, str | None]] = []

    async def progress(share: float, total: float | None, message: str | None) -> None:
        told.append((share, message))

    async def talk() -> None:
        async with mcp.Client(server(tmp_path)) as client:
            tools = (await client.list_tools()).tools
            assert {each.name for each in tools} == {"draw", "edit", "compare", "models", "picture"}
            assert all(each.description for each in tools)
            (model,) = rows(await client.call_tool("models"))
            assert (model["name"], model["width"]) == ("emoji", 128)
            assert "red apple" in model["concepts"]

            asked = {"prompt": "a red apple, glossy style", "seed": 7, "steps": 3}
            answer = await client.call_tool("draw", asked, progress_callback=progress)
            (drawn,) = rows(answer)
            assert drawn["seed"] == 7
            assert max(image(answer).size) <= 256
            assert len(answer.content[1].data) < 20_000, "some thousand tokens, not tens of thousands"
            with Pipeline.open("emoji") as pipeline:
                alone = pipeline.generate(Request(asked["prompt"], seed=7, steps=3)).pictures[0].image
            with Image.open(drawn["path"]) as kept:
                assert np.array_equal(np.asarray(kept), np.asarray(alone))
            assert Path(drawn["path"]).parent == tmp_path

            small = await client.call_tool("picture", {"image": drawn["name"]})
            assert rows(small)[0]["settings"]["steps"] == 3
            assert small.content[1].mime_type == "image/jpeg"
            full = await client.call_tool("picture", {"image": drawn["path"], "full": True})
            assert base64.b64decode(full.content[1].data) == Path(drawn["path"]).read_bytes()

            edit = {"image": drawn["name"], "prompt": "a green leaf", "strength": 0.5, "steps": 4, "seed": 1}
            (edited,) = rows(await client.call_tool("edit", edit))
            assert edited["name"] != drawn["name"]
            (again,) = rows(await client.call_tool("edit", {**edit, "image": full.content[1].data}))
            assert Path(again["path"]).read_bytes() == Path(edited["path"]).read_bytes(), "base64 or a name: the same"

            variants = ["openvino-fp16", "coreml-ane-fp16", "openvino-fp16-lcm"]
            answer = await client.call_tool("compare", {"prompt": "a cat", "variants": variants, "steps": 1, "seed": 3})
            first, second, third = rows(answer)
            assert first["psnr"] == 100
            assert "not drawn" in second, "Core ML is not here"
            assert third["psnr"] < 60
            assert max(image(answer).size) <= 256

            for tool, given, words in (
                ("draw", {"prompt": ""}, "prompt"),
                ("draw", {"prompt": "a cat", "steps": 0}, "steps"),
                ("draw", {"prompt": "a cat", "sampler": "best"}, "unknown sampler 'best'"),
                ("draw", {"prompt": "a cat", "model": "best"}, "no model 'best'; valid: emoji"),
                ("draw", {"prompt": "a cat", "count": 17}, "count"),
                ("draw", {"prompt": "a cat", "references": [drawn["name"]]}, "emoji takes no reference pictures"),
                ("draw", {"prompt": "a cat", "references": ["/etc/hostname"]}, "neither base64 nor"),
                ("draw", {"prompt": "a cat", "references": [drawn["name"]] * 5}, "at most 4"),
                ("edit", {"image": "/etc/hostname", "prompt": "a cat"}, "neither base64 nor"),
                ("edit", {"image": "AAAA", "prompt": "a cat"}, "not a PNG, JPEG or WebP"),
                ("picture", {"image": "../../etc/passwd"}, "no picture"),
                ("compare", {"prompt": "a cat", "variants": ["best"]}, "no variant 'best'"),
            ):
                line = said(await client.call_tool(tool, given))
                assert words in line
                assert "Traceback" not in line
                assert str(Path(__file__).parents[2]) not in line

            # A call that is given up stops within a step: the next one does not wait for it.
            started = time.monotonic()
            long = {"prompt": "a dog", "steps": 1000, "width": 512, "height": 512}
            with pytest.raises(Exception, match=r"[Tt]ime"):
                await client.call_tool("draw", long, read_timeout_seconds=1)
            rows(await client.call_tool("draw", {**asked, "steps": 1}))
            assert time.monotonic() - started < 30

    asyncio.run(talk())
    assert any(message and message.startswith("step") for _, message in told), told
    assert [share for share, _ in told] == sorted(share for share, _ in told)
    assert not [path.name for path in tmp_path.iterdir() if "dog" in path.name]


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "edge_sd", "mcp", "--http", "--port", "0", "--folder", str(folder)]
    with subprocess.Popen([*command, "--token", TOKEN], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        found = re.search(r"http://\S+", process.stderr.readline())
        try:
            assert found is not None
            yield found[0]
        finally:
            process.terminate()
            assert process.wait(30) == 0


def test_over_http_it_asks_for_the_token_and_keeps_other_pages_out(tmp_path: Path) -> None:
    async def talk(address: str) -> None:
        async with (
            httpx2.AsyncClient(headers={"authorization": f"Bearer {TOKEN}"}, timeout=60) as http,
            # As the clients of 2025 speak; the other test has the protocol of 2026.
            mcp.Client(streamable_http_client(address, http_client=http), mode="legacy") as client,
        ):
            (drawn,) = rows(await client.call_tool("draw", {"prompt": "a cat", "steps": 1, "seed": 1}))
            assert Path(drawn["path"]).is_file()

    with serving(tmp_path) as address:
        body = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}}
        shown = {"authorization": f"Bearer {TOKEN}"}
        assert httpx.post(address, json=body).status_code == 401
        assert httpx.post(address, json=body, headers={**shown, "host": "evil.example"}).status_code == 403
        assert httpx.post(address, json=body, headers={**shown, "origin": "null"}).status_code == 403
        asyncio.run(talk(address))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--http", "--host", "0.0.0.0"], "set a token in $EDGE_SD_TOKEN first"),
        (["--images", "no"], "the folder of pictures 'no' does not exist"),
        (["--model", "best"], "installed: emoji"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, words: list[str], message: str) -> None:
    command = [sys.executable, "-m", "edge_sd", "mcp", "--folder", str(tmp_path), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"edge-sd: [^\n]+\n", done.stderr)
    assert message in done.stderr
