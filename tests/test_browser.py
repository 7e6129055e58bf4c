"""The page of `lavit serve --web` in a real browser: `make test-browser`."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import toy_picture
from test_serve_hostile import process

CHROMIUM = shutil.which("chromium")
missing = [name for name in ("gradio", "playwright") if not importlib.util.find_spec(name)]
if missing or not CHROMIUM:
    pytest.skip("needs gradio, playwright and chromium: make test-browser", allow_module_level=True)

from playwright.sync_api import Page, expect, sync_playwright

SCREENS: dict[str, dict[str, Any]] = {
    "desk": {"viewport": {"width": 1200, "height": 800}, "color_scheme": "light"},
    "phone": {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"},
}
SHOTS = os.environ.get("SHOTS")  # a folder for screenshots, to be looked at


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with process("--web") as (_, found):
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as playwright:
        args = ["--no-sandbox"]
        with playwright.chromium.launch(executable_path=CHROMIUM, args=args) as found:
            yield found


@pytest.fixture(params=SCREENS)
def page(request: pytest.FixtureRequest, browser: Any, address: str) -> Iterator[Page]:
    """The page on a screen; what it asks of other servers fails the test."""
    context = browser.new_context(**SCREENS[request.param])
    context.set_default_timeout(120_000)
    expect.set_options(timeout=120_000)
    page, elsewhere = context.new_page(), []
    own = (address, "data:", "blob:")
    page.on("request", lambda sent: sent.url.startswith(own) or elsewhere.append(sent.url))
    page.goto(f"{address}/web")
    yield page
    if SHOTS:
        name = request.node.originalname
        page.screenshot(path=f"{SHOTS}/{request.param}-{name}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    dark = page.evaluate("document.body.classList.contains('dark')")
    assert dark == (request.param == "phone") and not elsewhere
    context.close()


def test_ask(page: Page, tmp_path: Path) -> None:
    toy_picture("red square", 64).save(tmp_path / "square.png")
    page.locator("input[type=file]").first.set_input_files(tmp_path / "square.png")
    page.get_by_role("button", name="Remove Image").first.wait_for()
    page.get_by_label("Question").fill("what is it?")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Answer").first).not_to_have_value("")
    expect(page.get_by_text(re.compile(r"The picture takes \d+ of 100 tokens"))).to_be_visible()


def test_draw_and_edit(page: Page) -> None:
    page.get_by_role("tab", name="Draw").click()
    prompt = page.get_by_label("Prompt")
    expect(prompt).to_be_visible()
    prompt.press("Enter")  # nothing is asked for
    expect(page.get_by_text("the prompt is empty")).to_be_visible()
    prompt.fill("a red star")
    page.get_by_label("Seed").fill("3")
    shown = page.locator(".filled img:visible")
    seen: set[str] = set()
    page.on("response", lambda found: "image.png" in found.url and seen.add(found.url))
    prompt.press("Enter")
    expect(page.get_by_text(re.compile(r"Drawn from \d+ of 100 tokens, seed 3"))).to_be_visible()
    until = time.monotonic() + 60
    while len(seen) < 3:  # it refines: previews come before it
        assert time.monotonic() < until
        page.wait_for_timeout(100)
    first = shown.get_attribute("src")
    page.get_by_role("button", name="Edit this drawing").click()
    page.get_by_role("button", name="Remove Image").first.wait_for()
    prompt.fill("make it blue")
    prompt.press("Enter")
    expect(shown).not_to_have_attribute("src", str(first))


def test_tokens_follow_what_is_drawn(page: Page) -> None:
    page.get_by_role("tab", name="Tokens").click()
    canvas = page.locator("canvas")
    count = page.get_by_text(re.compile(r"^\d+ of 100 patches are kept"))

    def settled() -> int:
        """The number of tokens, once it stays."""
        page.wait_for_timeout(1500)
        while (found := count.inner_text()) is not None:
            page.wait_for_timeout(1500)
            if count.inner_text() == found:
                return int(found.split()[0])
        raise AssertionError

    empty = settled()
    canvas.focus()
    for key in ["ArrowRight"] * 4 + ["ArrowDown"] * 4:
        page.keyboard.press(key)
    keyed = settled()
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    for row in range(5):
        left, top = box["x"] + 20, box["y"] + 20 + 50 * row
        page.mouse.move(left, top)
        page.mouse.down()
        page.mouse.move(left + box["width"] - 60, top + 30, steps=6)
        page.mouse.up()
    full = settled()
    expect(page.locator(".filled img:visible")).to_have_count(2)
    page.wait_for_timeout(500)
    assert empty < keyed < full
    canvas.press("Delete")
    assert settled() == empty
