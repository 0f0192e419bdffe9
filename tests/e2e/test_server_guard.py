"""Who is let in, and how much they may send. Each row is tried on every route of the schema."""

from __future__ import annotations

import base64
import json
import random
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from io import BytesIO
from itertools import product
from urllib.parse import urlsplit

import httpx
import pytest
from PIL import Image

from edge_sd.apps.server import guard, listen
from edge_sd.apps.server.guard import Rules
from edge_sd.apps.server.service import Service

from ..faults.account import Tally
from ..serving import served

TOKEN = "a-token-of-the-tests"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Service]]:
    rules = Rules(("pictures.example", "box.local:8080"), ("https://chat.example",))
    with served(tmp_path_factory.mktemp("server"), rules) as running:
        yield running


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(tmp_path_factory.mktemp("locked"), Rules(token=TOKEN)) as running:
        yield running[0]


@pytest.fixture(scope="module")
def routes(server: tuple[str, Service]) -> list[tuple[str, str]]:
    """Method and path of each route."""
    schema = httpx.get(f"{server[0]}/openapi.json").json()
    found = [(method, path.replace("{id_}", "0" * 24).replace("{n}", "0").replace("{name}", "emoji"))
             for path, each in schema["paths"].items() for method in each]  # fmt: skip
    return [*found, ("get", "/"), ("get", "/page/page.js"), ("get", "/none")]


def status(address: str, method: str, path: str, host: str | None, headers: dict[str, str]) -> int:
    """Of a request as it is written, whatever a client library thinks of its Host."""
    url = urlsplit(address)
    with socket.create_connection((url.hostname or "", url.port or 0), timeout=20) as connection:
        lines = [f"{method.upper()} {path} HTTP/1.1", *([] if host is None else [f"Host: {host}"]),
                 *(f"{name}: {value}" for name, value in headers.items()),
                 "Content-Length: 0", "Connection: close", "", ""]  # fmt: skip
        connection.sendall("\r\n".join(lines).encode("latin-1"))
        answer = b""
        while b"\r\n" not in answer and (more := connection.recv(4096)):
            answer += more
    return int(answer.split()[1])


def hosts_of(address: str) -> dict[str, bool]:
    """Values of Host, and whether they are let in."""
    port = urlsplit(address).port
    return {
        f"127.0.0.1:{port}": True, f"localhost:{port}": True, f"LocalHost:{port}": True, f"[::1]:{port}": True,
        "pictures.example": True, "pictures.example:99": True, "box.local:8080": True, "box.local:8081": False,
        "attacker.example": False, f"attacker.example:{port}": False, "127.0.0.1:1": False, "localhost": False,
        f"localhost.attacker.example:{port}": False, f"127.0.0.1:{port}@attacker.example": False, "": False,
        "localhost:99999": False,
    }  # fmt: skip


def origins_of(address: str) -> list[tuple[dict[str, str], bool]]:
    """Headers that say which page asks, and whether it is let in."""
    own = urlsplit(address).netloc
    return [
        ({}, True), ({"Origin": f"http://{own}"}, True), ({"Origin": "https://chat.example"}, True),
        ({"Origin": f"http://{own}", "Sec-Fetch-Site": "cross-site"}, True), ({"Sec-Fetch-Site": "same-origin"}, True),
        ({"Origin": "null"}, False), ({"Origin": "https://attacker.example"}, False),
        ({"Origin": "http://127.0.0.1:99999"}, False), ({"Origin": "http://127.0.0.1"}, False),
        ({"Origin": "http://localhost:3000"}, False), ({"Origin": f"http://{own}.attacker.example"}, False),
        ({"Sec-Fetch-Site": "cross-site"}, False), ({"Sec-Fetch-Site": "same-site"}, False),
        ({"Origin": "null", "Sec-Fetch-Site": "same-origin"}, False),
    ]  # fmt: skip


@pytest.mark.fault(12, "values of Host, of Origin, and both, on every route")
def test_only_the_allow_list_answers(server: tuple[str, Service], routes: list[tuple[str, str]], tally: Tally) -> None:
    address = server[0]
    own = urlsplit(address).netloc
    hosts, origins = hosts_of(address), origins_of(address)
    rows = list(product([(own, True)], origins, routes)) + list(product(hosts.items(), [({}, True)], routes))
    pairs = list(product(hosts.items(), origins, routes))
    rows += random.Random(0).sample(pairs, tally.count(len(pairs)))
    for (host, known), (headers, ours), (method, path) in rows:
        # A page that this server did not send is another origin, whatever else the server is called.
        good = known and ours and (host == own or own not in headers.get("Origin", ""))
        with tally.trial((host, headers, method, path), refused=not good):
            found = status(address, method, path, host, headers)
            if good:
                assert found != 403, found
                assert found != 400 or method != "get", found
            else:
                assert found in (400, 403), found


def test_a_link_from_elsewhere_opens_the_page_alone(server: tuple[str, Service]) -> None:
    address = server[0]
    own = urlsplit(address).netloc
    followed = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert status(address, "get", "/", own, followed) != 403
    assert status(address, "get", "/api/jobs", own, followed) == 403


def test_no_other_origin_is_ever_named(server: tuple[str, Service]) -> None:
    answer = httpx.get(f"{server[0]}/api/jobs", headers={"Origin": "https://chat.example"})
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    assert "server" not in answer.headers


@pytest.mark.fault(12, "tokens, good and bad, on every route")
def test_a_token_is_asked_for_on_every_route(locked: str, routes: list[tuple[str, str]]) -> None:
    own = urlsplit(locked).netloc

    def basic(text: str) -> dict[str, str]:
        return {"Authorization": f"Basic {base64.b64encode(text.encode()).decode()}"}

    good = [{"Authorization": f"Bearer {TOKEN}"}, basic(f"any:{TOKEN}"), {"Cookie": f"edge_sd={TOKEN}"}]
    bad: list[dict[str, str]] = [
        {}, {"Authorization": "Bearer"}, {"Authorization": f"Bearer {TOKEN}x"}, basic(f"{TOKEN}:"), basic(TOKEN),
        {"Authorization": "Basic ***"}, {"Cookie": "edge_sd="}, {"Cookie": "edge_sd=wrong; other=1"},
    ]  # fmt: skip
    public = {"/", "/health", "/page/page.js"}
    for method, path in routes:
        for headers in good:
            assert status(locked, method, path, own, headers) != 401, (method, path, headers)
        for headers in bad:
            found = status(locked, method, path, own, headers)
            assert (found == 401) == (path not in public), (method, path, headers, found)


@pytest.mark.fault(10, "requests that are too much")
def test_what_is_too_much_is_refused_at_once(server: tuple[str, Service], tally: Tally) -> None:
    address = server[0]
    parts = b"".join(b'--x\r\nContent-Disposition: form-data; name="f%d"\r\n\r\nv\r\n' % n for n in range(10_000))
    multipart = {"content-type": "multipart/form-data; boundary=x"}
    picture = BytesIO()
    Image.new("1", (8, 8)).save(picture, "PNG")
    # The size in the header alone: whoever decodes it first takes the memory.
    head = b"IHDR" + struct.pack(">II", 50_000, 50_000) + picture.getvalue()[24:29]
    huge = picture.getvalue()[:12] + head + struct.pack(">I", zlib.crc32(head)) + picture.getvalue()[33:]
    bomb = base64.b64encode(huge).decode()
    rows: list[tuple[str, bytes, dict[str, str], tuple[int, ...]]] = [
        ("/v1/images/edits", b"\0" * 51_000_000, multipart, (413,)),
        ("/v1/images/edits", parts + b"--x--\r\n", multipart, (400,)),
        ("/v1/images/edits", b"--x\r\nno header", multipart, (400,)),
        ("/v1/images/generations", b"[" * 10_000 + b"]" * 10_000, {}, (400, 422)),
        ("/v1/images/generations", b'{"prompt": ' + b'{"a":' * 10_000 + b"1" + b"}" * 10_001, {}, (400, 422)),
        ("/v1/images/generations", json.dumps({"prompt": "x" * 1_000_000}).encode(), {}, (400,)),
        ("/v1/images/generations", b'{"prompt": "x", "n": 11}', {}, (400,)),
        ("/v1/images/generations", b'{"prompt": "x", "n": 1e999}', {}, (400,)),
        ("/v1/images/generations", b'{"prompt": "x", "guidance": NaN}', {}, (400,)),
        ("/v1/images/generations", b'{"prompt": "x", "guidance": -Infinity}', {}, (400,)),
        ("/v1/images/generations", b'{"prompt": "x", "steps": -5}', {}, (400,)),
        ("/v1/images/generations", b'{"prompt": "\\ud800"}', {}, (400,)),
        ("/v1/images/generations", b"\xff\xfe", {}, (400,)),
        ("/sdapi/v1/txt2img", b'{"prompt": "x", "cfg_scale": NaN}', {}, (422,)),
        ("/sdapi/v1/txt2img", b'{"prompt": "x", "steps": 99999999999999999999999}', {}, (422,)),
        ("/sdapi/v1/img2img", json.dumps({"prompt": "x", "init_images": [bomb]}).encode(), {}, (400,)),
        ("/sdapi/v1/png-info", json.dumps({"image": "file:///etc/passwd"}).encode(), {}, (400,)),
        ("/sdapi/v1/img2img", json.dumps({"prompt": "x", "init_images": ["http://127.0.0.1/"]}).encode(), {}, (400,)),
        ("/api/jobs", json.dumps({"prompt": "x", "lora_folder": "/etc"}).encode(), {}, (422,)),
        ("/api/jobs", json.dumps({"prompt": "x", "loras": {"../../etc/passwd": 1}}).encode(), {}, (400,)),
        ("/api/jobs", json.dumps({"prompt": "x", "model": "/etc"}).encode(), {}, (404,)),
    ]  # fmt: skip
    for path, body, headers, expected in rows:
        with tally.trial((path, body[:60]), refused=True):
            started = time.perf_counter()
            answer = httpx.post(
                f"{address}{path}", content=body, headers={"content-type": "application/json", **headers}, timeout=30
            )
            seconds = time.perf_counter() - started
            assert answer.status_code in expected, answer.text[:200]
            assert "Traceback" not in answer.text
            assert seconds < 2
    assert not [job for job in server[1].jobs() if job.state != "cancelled"]


@pytest.mark.fault(8, "hostile paths in addresses")
def test_a_path_never_leaves_the_folder(server: tuple[str, Service], tally: Tally) -> None:
    own = urlsplit(server[0]).netloc
    for path in ("/page/../app.py", "/page/..%2fapp.py", "/page/%2e%2e/app.py", "/page//etc/passwd",
                 "/page/..%5capp.py", "/api/jobs/../../x/pictures/0", "/api/jobs/..%2f..%2f/pictures/0"):  # fmt: skip
        with tally.trial(path, refused=True):
            assert status(server[0], "get", path, own, {}) in (404, 422)


@pytest.mark.fault(11, "connections that send a byte at a time")
def test_slow_clients_are_closed_and_hold_nobody_up(
    server: tuple[str, Service], monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    """The full number waits for the limits as they are; a tenth of it for a tenth of them."""
    count = tally.count(200)
    if count < 200:
        monkeypatch.setattr(listen, "HEAD_SECONDS", 1.5)
        monkeypatch.setattr(guard, "BODY_SECONDS", 2.0)
    allowed = 30 if count == 200 else 10
    url = urlsplit(server[0])
    head = f"POST /api/jobs HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Length: 100\r\n\r\n".encode()
    opened = [socket.create_connection((url.hostname or "", url.port or 0)) for _ in range(count)]
    for n, each in enumerate(opened):
        each.sendall(head if n % 2 else head[:10])
    closed: list[float] = []
    started = time.monotonic()

    def drip(connection: socket.socket) -> None:
        connection.settimeout(1.0)
        while time.monotonic() - started < allowed + 5:
            try:
                connection.sendall(b"x")
                if not connection.recv(4096):
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        closed.append(time.monotonic() - started)

    threads = [threading.Thread(target=drip, args=(each,)) for each in opened]
    for thread in threads:
        thread.start()
    times = []
    with httpx.Client() as other:
        while any(thread.is_alive() for thread in threads):
            before = time.perf_counter()
            assert other.get(f"{server[0]}/health", timeout=5).status_code == 200
            times.append(time.perf_counter() - before)
            time.sleep(0.05)
    for seconds in closed:
        with tally.trial(f"closed after {seconds:.0f} s"):
            assert seconds < allowed
    # Two cores also run the clients' threads, so the share that waits is of the full number alone.
    rank = 0.99 if count == 200 else 0.5
    with tally.trial("/health meanwhile"):
        assert sorted(times)[int(rank * (len(times) - 1))] < 0.1


@pytest.mark.parametrize(
    ("host", "token", "words"),
    [
        ("0.0.0.0", "", "EDGE_SD_TOKEN"),
        ("::", "", "EDGE_SD_TOKEN"),
        ("192.168.1.5", "", "EDGE_SD_TOKEN"),
        ("pictures.example", "", "EDGE_SD_TOKEN"),
        ("127.0.0.1", "short", "16 or more"),
    ],
)
def test_beyond_this_machine_a_token_is_needed(host: str, token: str, words: str) -> None:
    from edge_sd.apps.server.commands import check_token
    from edge_sd.errors import InvalidRequest

    with pytest.raises(InvalidRequest, match=words):
        check_token(host, token)


@pytest.mark.parametrize("path", ["/v1/images/generations", "/sdapi/v1/txt2img", "/api/jobs"])
@pytest.mark.parametrize(
    ("body", "words"), [("{", "the body is no JSON: "), ("", "the body is missing"), ("[]", "valid dictionary")]
)
def test_a_body_that_is_no_object_is_said_to_be_so(
    server: tuple[str, Service], path: str, body: str, words: str
) -> None:
    answer = httpx.post(server[0] + path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == (400 if path.startswith("/v1/") else 422)
    said = answer.json()
    assert words in (said["error"]["message"] if path.startswith("/v1/") else said["detail"])
    if path.startswith("/v1/"):
        assert said["error"]["param"] is None
