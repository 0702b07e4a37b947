"""Draws docs/pictures/app.png: the page of ``fewshot-seg app`` with its own example, in a headless Chromium.

    python scripts/draw_app.py [--out docs/pictures/app.png] [--width 1100]

Needs the extra ``app``, playwright, and Chromium (Debian: apt-get install chromium).
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from fewshot_seg.app.serving import serve
from fewshot_seg.app.session import Engine
from fewshot_seg.config import ModelSettings
from fewshot_seg.predictors import USUAL_SIZE, method_for_photos
from fewshot_seg.runtime import atomic_path


def screenshot(address: str, width: int, height: int) -> Image.Image:
    """The page after "Try an example"."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": height})
        page.goto(address)
        page.click("#try")
        page.locator(".result img").nth(5).wait_for(timeout=120_000)
        page.mouse.move(0, 0)
        page.wait_for_timeout(1000)
        shot = page.screenshot()
        browser.close()
    return Image.open(io.BytesIO(shot)).convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures/app.png"))
    parser.add_argument("--width", type=int, default=1100)
    parser.add_argument("--height", type=int, default=960)
    given = parser.parse_args()
    method = method_for_photos(ModelSettings())
    engine = Engine(
        segmenter=method.segmenter, resolution=method.resolution or USUAL_SIZE, fit=method.fit, name=method.name
    )
    with serve(engine) as served:
        picture = screenshot(served.address, given.width, given.height)
    with atomic_path(given.out) as temporary:
        picture.quantize(256, kmeans=3).save(temporary, optimize=True)  # half the bytes
    print(given.out)


if __name__ == "__main__":
    main()
