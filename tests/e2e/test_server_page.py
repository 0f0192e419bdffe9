"""The page in a real browser: what a person does with it, and what its bytes and its markup promise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Page, Response, expect

from edge_sd.apps.server.guard import Rules
from edge_sd.apps.server.service import Service
from edge_sd.apps.server.wish import Wish

from ..browser import PATIENCE, needs_browser
from ..serving import served

pytestmark = needs_browser
TOKEN = "a-token-of-the-tests"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Service]]:
    with served(tmp_path_factory.mktemp("server")) as running:
        for seed, prompt in enumerate(("a red apple, glossy style", "a rocket, flat style")):
            running[1].submit(Wish(prompt=prompt, seed=seed, steps=2, width=64, height=64)).ended.result(timeout=60)
        yield running


@pytest.fixture
def page(browser: Browser, server: tuple[str, Service]) -> Iterator[Page]:
    """A fresh page, whose errors are the test's."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    opened = context.new_page()
    opened.set_default_timeout(PATIENCE)
    wrong: list[str] = []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    # The browser says of every answer such as 422 that it could not be loaded.
    expected = "Failed to load resource"
    opened.on(
        "console",
        lambda message: message.type == "error" and expected not in message.text and wrong.append(message.text),
    )
    opened.goto(server[0])
    expect(opened.locator("#plan summary")).to_contain_text("openvino-fp16 on cpu")
    yield opened
    context.close()
    assert not wrong


def test_it_is_small_and_asks_no_other_host(browser: Browser, server: tuple[str, Service]) -> None:
    context = browser.new_context()
    opened = context.new_page()
    answers: list[Response] = []
    opened.on("response", lambda answer: answers.append(answer))
    opened.goto(server[0])
    expect(opened.locator("#gallery li")).to_have_count(2)
    hosts = {urlsplit(each.url).netloc for each in answers}
    size = sum(len(each.body()) for each in answers if "/api/events" not in each.url and "/pictures/" not in each.url)
    context.close()
    assert hosts == {urlsplit(server[0]).netloc}
    assert 20_000 < size <= 150_000


def test_a_picture_is_drawn_seen_and_used_again(page: Page, server: tuple[str, Service]) -> None:
    page.fill("#prompt", "a cat face, 3d style")
    # Long enough to be seen while it is drawn, on a quiet machine too.
    page.fill("#steps", "400")
    page.press("#prompt", "Control+Enter")
    expect(page.locator("#live")).to_contain_text("a cat face")
    expect(page.locator("#live img")).to_be_visible()
    expect(page.locator("#gallery li")).to_have_count(3)
    page.locator("#gallery .show").first.click()
    expect(page.locator("#detail dl")).to_contain_text("openvino-fp16")
    seed = server[1].jobs()[-1].wish.seed
    page.click("text=Use these")
    assert page.input_value("#seed") == str(seed)
    assert page.input_value("#steps") == "400"
    assert page.get_attribute("#lock", "aria-pressed") == "true"


def test_a_job_is_seen_after_a_reload_and_cancelled(page: Page, server: tuple[str, Service]) -> None:
    page.fill("#prompt", "a long job")
    page.fill("#steps", "900")
    page.click("#form .primary")
    page.fill("#steps", "901")
    page.click("#form .primary")
    expect(page.locator("#queue li")).to_have_count(1)
    page.reload()
    expect(page.locator("#live")).to_contain_text("Step")
    expect(page.locator("#live")).to_contain_text("left")
    assert page.input_value("#steps") == "901"
    page.click("#queue button")
    expect(page.locator("#queue li")).to_have_count(0)
    page.click("#live button")
    expect(page.locator("#live")).to_contain_text("Cancelled")
    assert [job.state for job in server[1].jobs()[-2:]] == ["cancelled", "cancelled"]


def test_what_is_wrong_is_said_beside_the_button(page: Page) -> None:
    page.click("#form .primary")
    expect(page.locator("#mistake")).to_contain_text("prompt")
    page.fill("#prompt", "a cat")
    page.fill("#width", "1024")
    page.click("#form .primary")
    expect(page.locator("#mistake")).to_contain_text("limit of 512")


def paint(page: Page, canvas: str) -> None:
    """A stroke across the right half."""
    page.locator(canvas).scroll_into_view_if_needed()
    box = page.locator(canvas).bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 0.2 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 0.8 * box["height"], steps=4)
    page.mouse.up()


def test_a_picture_is_painted_over_and_a_sketch_followed(
    page: Page, server: tuple[str, Service], tmp_path: Path
) -> None:
    image = Image.effect_noise((128, 128), 90).convert("RGB")
    image.save(tmp_path / "noise.png")
    page.fill("#prompt", "a star")
    page.fill("#steps", "3")
    page.set_input_files("#file-image", tmp_path / "noise.png")
    paint(page, "#canvas-image canvas.mask")
    page.click("#sketch")
    paint(page, "#canvas-control canvas.layer")
    before = len(server[1].jobs())
    page.click("#form .primary")
    expect(page.locator("#gallery li").first.locator("img")).to_have_attribute("alt", "a star")
    job = server[1].jobs()[before]
    job.ended.result(timeout=60)
    assert job.view()["given"] == ["image", "mask", "control"]
    assert job.wish.control_reading == "scribble"
    drawn = np.asarray(Image.open(server[1].store.picture(job, 0) or ""))
    assert np.array_equal(drawn[:, :64], np.asarray(image)[:, :64])
    assert not np.array_equal(drawn[:, 96:], np.asarray(image)[:, 96:])


def test_a_dropped_picture_offers_its_parameters(page: Page, server: tuple[str, Service]) -> None:
    job = server[1].jobs()[0]
    page.set_input_files("#file-image", server[1].store.picture(job, 0) or "")
    page.click("#toast button")
    assert page.input_value("#prompt") == "a red apple, glossy style"
    assert page.input_value("#width") == "64"
    expect(page.locator("#canvas-image")).to_be_hidden()


def test_the_gallery_searches_compares_and_deletes_with_undo(page: Page) -> None:
    expect(page.locator("#gallery li").first).to_be_visible()
    count = page.locator("#gallery li").count()
    page.keyboard.press("Escape")
    page.locator("h1").click()
    page.keyboard.press("/")
    page.keyboard.type("apple")
    expect(page.locator("#gallery li")).to_have_count(1)
    page.fill("#search", "")
    expect(page.locator("#gallery li")).to_have_count(count)
    page.check("#gallery .pick >> nth=0")
    page.check("#gallery .pick >> nth=1")
    page.click("#compare")
    page.locator("#slider").press("Home")
    cut = page.evaluate("getComputedStyle(document.querySelectorAll('.over img')[1]).clipPath")
    assert cut == "inset(0px 0px 0px 0%)"
    page.keyboard.press("Escape")
    page.locator("#gallery .show").last.click()
    page.click("#detail >> text=Delete")
    expect(page.locator("#gallery li")).to_have_count(count - 1)
    page.click("#toast >> text=Undo")
    expect(page.locator("#gallery li")).to_have_count(count)


def test_words_go_into_the_prompt(page: Page) -> None:
    page.fill("#prompt", "")
    page.click("#tab-words")
    page.fill("#words-search", "rocket")
    page.click("#words >> text=rocket")
    page.keyboard.press("Tab")
    page.click("#tab-words")
    page.fill("#words-search", "")
    page.click("#words >> text=/^flat$/")
    assert page.input_value("#prompt") == "rocket, flat style"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 360])
def test_axe_finds_nothing(page: Page, scheme: str, width: int) -> None:
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    page.set_viewport_size({"width": width, "height": 800})
    expect(page.locator("#gallery li").first).to_be_visible()
    for tab in ("#tab-draw", "#tab-words", "#tab-quant"):
        page.click(tab)
        found = Axe().run(page).response["violations"]
        assert [(each["id"], each["nodes"][0]["html"]) for each in found] == [], tab
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.click("#tab-draw")
    page.locator("#gallery .show").first.click()
    assert Axe().run(page).response["violations"] == []


def test_the_tabs_go_by_arrow_keys(page: Page) -> None:
    page.locator("#tab-draw").press("ArrowRight")
    expect(page.locator("#panel-words")).to_be_visible()
    page.locator("#tab-words").press("ArrowLeft")
    expect(page.locator("#panel-draw")).to_be_visible()


def test_a_token_is_asked_for_once(browser: Browser, tmp_path: Path) -> None:
    with served(tmp_path, Rules(token=TOKEN)) as (address, _):
        context = browser.new_context()
        opened = context.new_page()
        opened.goto(address)
        opened.fill("#token", "wrong")
        opened.click("#login button")
        expect(opened.locator("#login [role=alert]")).to_be_visible()
        opened.fill("#token", TOKEN)
        opened.click("#login button")
        expect(opened.locator("#plan summary")).to_contain_text("cpu")
        opened.reload()
        expect(opened.locator("#plan summary")).to_contain_text("cpu")
        assert context.cookies()[0]["httpOnly"]
        assert context.cookies()[0]["sameSite"] == "Strict"
        context.close()
        other = browser.new_context()
        opened = other.new_page()
        opened.goto(f"{address}/#token={TOKEN}")
        expect(opened.locator("#plan summary")).to_contain_text("cpu")
        assert TOKEN not in opened.url
        other.close()


def test_variants_are_compared_and_the_report_opens(page: Page) -> None:
    page.click("#tab-quant")
    page.fill("#quant-prompts", "a cat face")
    page.fill("#quant-steps", "1")
    page.fill("#quant-rounds", "0")
    page.click("#quant-form .primary")
    expect(page.locator("#quant-runs")).to_contain_text("emoji: running")
    page.locator("#quant-runs a").wait_for(timeout=2 * PATIENCE)
    with page.context.expect_page() as opening:
        page.click("#quant-runs a")
    report = opening.value
    expect(report.locator("h1")).to_contain_text("variants against")
    # Its script runs, and may ask nobody.
    assert report.evaluate("fetch('/api/jobs').then(() => 'let in', () => 'kept out')") == "kept out"
