"""The comparison's report in a browser: sorting, dragging, a window of 1400 pixels and a sheet of A4."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page

from edge_sd.apps.compare.page import page as report_page

from ..browser import PATIENCE, needs_browser

pytestmark = needs_browser
# Of a sheet of A4 within its margins, at 96 CSS pixels to the inch.
SHEET = int((210 - 24) / 25.4 * 96)


def row(name: str, megabytes: float, psnr: float, kind: str = "variant") -> dict[str, Any]:
    def of(mean: float) -> dict[str, float]:
        return {"mean": mean, "error": 0.3, "median": mean, "worst": mean - 2}

    seconds = {part: {"median": megabytes / 9, "low": 0.1, "high": 9.0} for part in ("load", "first", "step", "decode")}
    quality = {name: of(psnr) for name in ("latent_psnr", "psnr", "ssim", "ms_ssim", "lpips", "agreement", "clip")}
    return {
        "name": name, "kind": kind, "folder": name, "device": "cpu", "quality": quality,
        "bytes": {"unet": megabytes * 1e6, "compared": megabytes * 1e6, "total": megabytes * 1e6},
        "speed": {**seconds, "memory": {"median": megabytes * 1e7}, "energy": {"median": 3.0}, "rounds": 1},
        "pictures": [{"shot": "0", "prompt": "a red apple", "seed": 1, "psnr": psnr}],
    }  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    rows = [row("openvino-fp32", 108.5, 90, "reference"), row("openvino-int4", 27.4, 32.0),
            row("openvino-w8a8", 29.0, 42.2), row("openvino-fp16", 56.3, 52.0)]  # fmt: skip
    for n, each in enumerate(rows):
        (folder / each["name"]).mkdir()
        Image.new("RGB", (64, 64), (60 * n, 90, 200)).save(folder / each["name"] / "0.png")
    machine = {
        "processor": "a processor",
        "cores": 2,
        "system": "Linux",
        "python": "3.11",
        "versions": {"openvino": "1"},
    }
    document = {
        "model": "emoji", "reference": "openvino-fp32", "recommendation": "The smallest is openvino-int4.",
        "rows": rows,
        "prompts": ["a red apple"], "seeds": [1], "definitions": {"PSNR": "of pictures"}, "notes": [], "pareto": [],
        "machine": machine,
    }  # fmt: skip
    (folder / "report.html").write_text(report_page(document, folder), "utf-8")
    return folder / "report.html"


@pytest.fixture
def page(browser: Browser, report: Path) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    opened = context.new_page()
    opened.set_default_timeout(PATIENCE)
    wrong: list[str] = []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.goto(report.as_uri())
    yield opened
    assert wrong == []
    context.close()


def names(page: Page) -> list[str]:
    return [each.split(" ")[0] for each in page.locator("table.sortable tbody th").all_inner_texts()]


def test_the_first_click_puts_the_best_first_and_the_second_the_worst(page: Page) -> None:
    for title, best, worst in (("PSNR", "openvino-fp32", "openvino-int4"), ("MB", "openvino-int4", "openvino-fp32")):
        head = page.locator("table.sortable thead th").get_by_text(title, exact=True)
        head.click()
        assert names(page)[0] == best
        head.click()
        assert names(page)[0] == worst


def test_dragging_on_the_picture_moves_the_border(page: Page) -> None:
    stage = page.locator(".stage")
    stage.scroll_into_view_if_needed()
    box = stage.bounding_box()
    assert box is not None
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * 0.5, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.2, middle)
    page.mouse.up()
    assert abs(int(page.locator("#divide").input_value()) - 20) <= 2
    page.mouse.move(box["x"] + box["width"] * 0.9, middle)
    assert abs(int(page.locator("#divide").input_value()) - 20) <= 2, "let go of, it stays"


def test_nothing_is_cut_at_1400_pixels(page: Page) -> None:
    for table in page.locator(".scroll").all():
        beyond = table.evaluate("each => each.scrollWidth - each.clientWidth")
        assert beyond <= 1
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_sheet_of_a4_holds_every_table_and_folds_are_open(page: Page) -> None:
    page.set_viewport_size({"width": SHEET, "height": 1000})
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    for table in page.locator("table").all():
        right = table.evaluate("each => each.getBoundingClientRect().right")
        assert right <= SHEET + 1
    assert page.locator(".slider").is_hidden()
    assert page.locator("details:not([open])").count() == 0
    assert len(page.pdf()) > 10_000


def test_one_round_shows_no_spread(report: Path) -> None:
    text = report.read_text("utf-8")
    assert "<p>One round.</p>" in text
    assert "(0.100 to 9.000)" not in text
