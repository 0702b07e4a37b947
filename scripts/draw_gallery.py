"""Draw the pictures of README and docs from a run on synthetic data: an episode, and the report at two widths.

    python scripts/draw_gallery.py --run runs/demo            # after `fewshot-seg demo`
    python scripts/draw_gallery.py --run runs/demo --number 4 # another of the episodes that the demo drew

The report is photographed by the Chromium that is installed (and playwright of the dev group). Real photos do not
belong into the repository: a run on other than synthetic data is refused.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from fewshot_seg.pictures import Panel, panel_sheet
from fewshot_seg.reports import REPORT_NAME, ReportedRun, read_run

_COLOURS = 256
"""Of the palette: the pictures are shown small, and git keeps every version."""
_VIEWS = {"report.png": (1100, 900, "details.run"), "report-phone.png": (360, 740, "#run1-why")}
"""Width and height in pixels, and what is at the top."""


def draw_episode(run: ReportedRun, number: int, path: Path) -> None:
    """The panels of one drawn episode in a row, as PNG."""
    episode = run.episodes[number]
    panels = []
    for panel in episode.panels:
        with Image.open(panel.path) as picture:
            shown = np.asarray(picture.convert("RGB"))
        panels.append(Panel(picture=shown, label=panel.label, scale=panel.label.startswith(("attention", "prior"))))
    title = f"{episode.class_name}: find it in {episode.query_id}, as shown in {', '.join(episode.support_ids)}"
    _save(Image.fromarray(panel_sheet([panels], f"{title}. IoU {episode.iou:.0f}%")), path)


def photograph(page: Path, folder: Path) -> None:
    """The top of the page at a desktop's and a phone's width."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, (width, height, top) in _VIEWS.items():
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme="light")
            view = context.new_page()
            view.goto(page.resolve().as_uri())
            view.evaluate("top => document.querySelector(top).scrollIntoView()", top)
            view.screenshot(path=folder / name)
            context.close()
            with Image.open(folder / name) as shot:
                _save(shot.convert("RGB"), folder / name)
        browser.close()


def _save(picture: Image.Image, path: Path) -> None:
    # refined by k-means: the median cut alone takes the few bright yellow pixels of a map for brown
    picture.quantize(_COLOURS, kmeans=5, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    """Write ``demo.png``, ``report.png`` and ``report-phone.png``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder that `fewshot-seg demo` wrote")
    parser.add_argument("--number", type=int, help="the episode to show (default: the one in the middle of all)")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"), help="folder of the pictures")
    arguments = parser.parse_args()
    run = read_run(arguments.run)
    if run.results["benchmark"] != "synthetic":
        parser.error(
            f"{arguments.run} is a run on {run.results['benchmark']}: only synthetic pictures may be published"
        )
    number = run.drawn[2] if arguments.number is None else arguments.number
    if number not in run.drawn:
        parser.error(f"episode {number} was not drawn; drawn are {sorted(run.drawn)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    draw_episode(run, number, arguments.out / "demo.png")
    photograph(arguments.run / REPORT_NAME, arguments.out)


if __name__ == "__main__":
    main()
