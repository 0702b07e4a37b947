"""The report in a real browser, opened from disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fewshot_seg.reports import read_run, write_report

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser
MakeRun = Callable[..., Path]
HOSTILE = "<img src=x onerror=\"document.title='owned'\">"
NAMES = ("cat", "dog", HOSTILE)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, make_run: MakeRun) -> Path:
    folder = tmp_path_factory.mktemp("report")
    page = folder / "report.html"
    runs = [make_run(folder / name, names=NAMES, drawn=12 - 9 * n, noise=n / 10) for n, name in enumerate(("a", "b"))]
    write_report(page, [read_run(run) for run in runs])
    return page


@pytest.fixture
def opened(browser_page: Page, report: Path) -> Page:
    """The report, opened; anything it asks for but itself fails the test."""
    asked = list[str]()
    browser_page.on("request", lambda request: asked.append(request.url))
    browser_page.goto(report.as_uri())
    assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()]
    return browser_page


def shown(page: Page) -> list[tuple[str, float]]:
    """Class and IoU of the visible episodes of the first run, in order."""
    found = page.eval_on_selector_all(
        "#run1-episodes .episode", "all => all.filter(e => e.offsetParent).map(e => [e.dataset.class, +e.dataset.iou])"
    )
    return [(name, iou) for name, iou in found]


def test_gallery_filters_and_sorts(opened: Page) -> None:
    form = opened.locator("#run1-episodes form")
    everything = shown(opened)
    assert len(everything) == 12
    assert everything == sorted(everything, key=lambda one: one[1])
    form.get_by_label("Class").select_option("dog")
    assert {name for name, _ in shown(opened)} == {"dog"}
    assert form.get_by_role("status").inner_text() == "4 of 12 drawn episodes"
    form.get_by_label("Class").select_option(HOSTILE)
    assert [name for name, _ in shown(opened)] == [HOSTILE] * 4
    form.get_by_label("Class").select_option("")
    form.get_by_label("Sort by").select_option("-iou")
    assert shown(opened) == sorted(everything, key=lambda one: -one[1])
    form.get_by_label("Sort by").select_option("class")
    assert [name for name, _ in shown(opened)] == sorted((n for n, _ in everything), key=lambda n: (n[0] != "<", n))
    form.get_by_label("Kind").select_option("missed")
    assert {name for name, _ in shown(opened)} == {"cat"}


def test_gallery_by_keyboard_alone(opened: Page) -> None:
    opened.locator("#run1-episodes form").get_by_label("Class").focus()
    opened.keyboard.type("d")
    assert {name for name, _ in shown(opened)} == {"dog"}
    opened.keyboard.press("Tab")
    opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.name") == "sort"


def test_card_of_a_class_leads_to_its_episodes(opened: Page) -> None:
    card = opened.locator("section[aria-labelledby=run1-why] li.card", has_text="misses parts").first
    card.get_by_role("link", name="See its episodes").click()
    assert {name for name, _ in shown(opened)} == {"cat"}


def test_second_run_unfolds(opened: Page) -> None:
    gallery = opened.locator("#run2-episodes .episode")
    assert not gallery.first.is_visible()
    opened.locator("details.run > summary").nth(1).click()
    assert gallery.first.is_visible()


def test_hostile_names_are_text(opened: Page) -> None:
    assert "side by side" in opened.title()
    assert opened.locator("img[src=x]").count() == 0
    assert opened.get_by_role("rowheader", name=HOSTILE).first.is_visible()


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_scrolls_sideways_and_all_pictures_are_there(opened: Page, width: int) -> None:
    opened.set_viewport_size({"width": width, "height": 800})
    opened.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    broken = "all => all.filter(one => !one.complete || !one.naturalWidth).length"
    opened.wait_for_function("[...document.images].every(one => one.complete)")
    assert opened.eval_on_selector_all("img", broken) == 0
    assert opened.locator("img").count() == (12 + 3 + 3 + 3) * 7


def test_reads_without_its_script(browser: object, report: Path) -> None:
    context = browser.new_context(java_script_enabled=False)  # type: ignore[attr-defined]
    page = context.new_page()
    page.goto(report.as_uri())
    assert page.locator("#run1-episodes .episode").count() == 12
    assert page.locator("#run1-episodes .episode").first.is_visible()
    assert not page.locator("#run1-episodes form").is_visible()
    context.close()


CONTRAST = """
() => {
  const parse = (c) => c.match(/[0-9.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, n) => sum + v * [0.2126, 0.7152, 0.0722][n], 0);
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] === 1) return c;
    }
    return [255, 255, 255];
  };
  const weak = [];
  for (const e of document.querySelectorAll("body *")) {
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
    if (!e.offsetParent || e.closest("script")) continue;
    const [a, b] = [luminance(parse(getComputedStyle(e).color)), luminance(ground(e))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) weak.push(e.outerHTML.slice(0, 80));
  }
  return weak;
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_the_contrast_of_wcag_aa(opened: Page, scheme: str) -> None:
    opened.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    assert opened.evaluate(CONTRAST) == []
