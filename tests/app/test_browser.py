"""The app in a browser: draw, look at the trajectory, enlarge, see an error. Needs Debian's chromium."""

import re
import shutil

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="apt-get install chromium"),
]


@pytest.fixture(scope="module")
def page(app):
    """The page in a new browser; at the end, no request has left this machine."""
    requests, errors = [], []
    playwright.expect.set_options(timeout=30_000)  # ms; the machine may be busy
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(app.url)
        page.wait_for_selector("#draw-start")
        yield page
        browser.close()
    local = (app.url, "data:", "blob:")
    assert [url for url in requests if not url.startswith(local)] == []
    assert errors == []


def status(page):
    return page.locator(".prose.status:visible")


def test_draw_and_walk_through_the_trajectory(page):
    page.get_by_label("Seeds").first.fill("0-2")
    page.click("#draw-start")
    playwright.expect(status(page)).to_contain_text("3 images in")
    images = page.locator("#drawn img")
    playwright.expect(images).to_have_count(3)
    for image in images.all():
        playwright.expect(image).to_have_js_property("naturalWidth", 16)
    shown = page.locator("#trajectory img")
    last = shown.get_attribute("src")
    playwright.expect(page.get_by_text("stage relay: its result")).to_be_visible()
    page.locator("#step input[type=number]").fill("1")
    page.keyboard.press("Enter")
    playwright.expect(page.get_by_text(re.compile(r"stage base: evaluation 1 of \d+, noise level"))).to_be_visible()
    playwright.expect(shown).not_to_have_attribute("src", last)


def test_a_mistake_is_one_line_in_the_page(page):
    page.get_by_label("Seeds").first.fill("seven")
    page.click("#draw-start")
    playwright.expect(page.locator("[role=alert]:visible")).to_have_text(re.compile("^seeds=seven: use"))


def test_cancel(page):
    page.get_by_label("Seeds").first.fill("0-15")
    for stage in ("base", "relay"):
        page.get_by_label(f"number input for {stage}: steps").first.fill("40")
        page.keyboard.press("Enter")
    page.click("#draw-start")
    playwright.expect(status(page)).to_contain_text(re.compile(r"^[1-9]\d* of 1696 network evaluations"))
    page.click("#draw-cancel")
    playwright.expect(status(page)).to_have_text("cancelled")
    playwright.expect(page.locator("#drawn img")).to_have_count(0)


def test_enlarge_and_a_damaged_file(page, tmp_path):
    page.get_by_role("tab", name="Enlarge").click()
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    page.set_input_files("#image input[type=file]", tmp_path / "broken.png")
    page.wait_for_selector("#image img", state="attached")
    page.click("#enlarge-start")
    playwright.expect(page.locator("[role=alert]:visible")).to_contain_text("image is not a PNG")
    page.locator("#image button").first.click()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "small.png")
    page.set_input_files("#image input[type=file]", tmp_path / "small.png")
    page.wait_for_selector("#image img", state="attached")
    page.click("#enlarge-start")
    playwright.expect(status(page)).to_contain_text("40x24 in")
    sides = page.locator("#enlarged img")
    playwright.expect(sides).to_have_count(2)
    playwright.expect(sides.last).to_be_visible()
    for image in sides.all():
        playwright.expect(image).to_have_js_property("naturalWidth", 40)


def test_compare(page):
    page.get_by_role("tab", name="Compare").click()
    page.click("#compare-start")
    playwright.expect(status(page)).to_contain_text("network evaluations each. Multistep: ")
    playwright.expect(page.locator("#compared-0 img")).to_have_count(4)
    playwright.expect(page.locator("#compared-1 img")).to_have_count(4)
