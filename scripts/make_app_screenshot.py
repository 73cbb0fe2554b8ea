"""Draw eight emoji in the web app and save a screenshot of it.

python scripts/make_app_screenshot.py picture=FILE.webp [key=value ...]

picture  the WebP to write
relay    a relay with text                                               (emoji)
enlarge  another relay for the tab Enlarge                               (photos)
prompts  file with a prompt on each line                                 (demo/prompts.txt)
step     network evaluation that the trajectory shows                    (7)

Needs `pip install -e '.[app]' playwright` and Debian's chromium, `apt-get install chromium`.
"""

from __future__ import annotations

import io
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from relay_diffusion.app.server import serving
from relay_diffusion.app.studio import Limits, build_studio
from relay_diffusion.checkpoints.loading import load_relay
from relay_diffusion.cli.app import usable_port
from relay_diffusion.cli.arguments import run_tool
from relay_diffusion.errors import UserError
from relay_diffusion.utils.pictures import save_still_webp

WIDTH, HEIGHT = 1280, 1060  # pixels of the browser's page
SAMPLING, OTHERS = 600_000, 60_000  # ms to wait for the samples, and for anything else
LOADED = "[...document.querySelectorAll('#drawn img, #trajectory img')].every(image => image.complete)"


@dataclass
class Options:
    """Options of this command; see above."""

    picture: str = MISSING
    relay: str = "emoji"
    enlarge: str = "photos"
    prompts: str = "demo/prompts.txt"
    step: int = 7


def draw(page: Page, prompts: list[str], step: int) -> None:
    """Sample one image for each prompt and move the trajectory to a step."""
    page.get_by_label("Prompt").first.fill("\n".join(prompts))
    page.get_by_label("Seeds").first.fill(f"0-{len(prompts) - 1}")
    page.click("#draw-start")
    expect(page.locator(".prose.status:visible")).to_contain_text(f"{len(prompts)} images in", timeout=SAMPLING)
    expect(page.locator("#drawn img")).to_have_count(len(prompts))
    page.locator("#step input[type=number]").fill(str(step))
    page.keyboard.press("Enter")
    expect(page.get_by_text(f"evaluation {step} of")).to_be_visible()
    page.wait_for_function(LOADED)


def run(options: Options) -> None:
    """Serve the app, draw, and save the screenshot."""
    browser = shutil.which("chromium")
    if browser is None:
        raise UserError("chromium: not found; run apt-get install chromium")
    prompts = Path(options.prompts).read_text().splitlines()
    relay, other = load_relay(options.relay), load_relay(options.enlarge)
    studio = build_studio(options.relay, relay, {options.enlarge: other}, Limits())
    expect.set_options(timeout=OTHERS)
    with serving(studio, port=usable_port("127.0.0.1", 0)) as url, sync_playwright() as driver:
        page = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page(
            viewport={"width": WIDTH, "height": HEIGHT}
        )
        page.goto(url)
        draw(page, prompts, options.step)
        screenshot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    save_still_webp(screenshot, Path(options.picture))
    print(f"{options.picture}: {screenshot.width}x{screenshot.height}")


if __name__ == "__main__":
    sys.exit(run_tool(sys.argv[1:], __doc__ or "", Options, run))
