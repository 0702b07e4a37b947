"""A page of a real, headless Chromium; tests that use it skip with a reason where there is none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def _chromium() -> str | None:
    """The browser that is installed; FEWSHOT_SEG_CHROMIUM names another."""
    found = (shutil.which(name) for name in (os.environ.get("FEWSHOT_SEG_CHROMIUM", ""), *_NAMES) if name)
    return next((path for path in found if path is not None), None)


@pytest.fixture(scope="module")  # not session: playwright's event loop would stay open under the tests of other modules
def browser() -> Iterator[Browser]:
    """Headless Chromium."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: it is in the dev group")
    path = _chromium()
    if path is None:
        pytest.skip("no chromium here: install it (apt-get install chromium), or name it in FEWSHOT_SEG_CHROMIUM")
    with api.sync_playwright() as playwright:
        # --no-sandbox: CI runs as root, where Chromium refuses to start with it
        launched = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield launched
        launched.close()


@pytest.fixture
def browser_page(browser: Browser) -> Iterator[Page]:
    """A fresh page of 1280 x 900 that has not been anywhere; exceptions of its scripts fail the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    page, errors = context.new_page(), list[str]()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.set_default_timeout(120_000)  # a busy machine
    yield page
    context.close()
    assert not errors, f"the page's scripts failed: {errors}"
