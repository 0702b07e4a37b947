"""The page of ``fewshot-seg app`` in a real browser, as a visitor uses it."""

from __future__ import annotations

import json
import re
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from episodes.types import DataError
from fewshot_seg.app.limits import Limits
from fewshot_seg.app.serving import Served, serve
from fewshot_seg.app.session import Engine
from fewshot_seg.backbones import build_backbone
from fewshot_seg.segmenter import training_free

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser
LIMITS = Limits(supports=2, queries=8, file_bytes=200_000)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """The page with an untrained model, on a free port."""
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'fewshot-seg[app]'")
    segmenter = training_free(build_backbone("mobilenetv3_small_050", weights="random"), threshold=0.3).eval()
    with serve(Engine(segmenter=segmenter, resolution=64, fit="squash", name="tiny"), reach=20, limits=LIMITS) as page:
        yield page
    assert not page.folder.exists()


@pytest.fixture
def opened(served: Served, browser_page: Page) -> Iterator[Page]:
    """The page, open; requests to anywhere else fail the test."""
    outside: list[str] = []
    own = urlsplit(served.address).netloc

    def note(url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("data", "blob") and parts.netloc != own:
            outside.append(url)

    browser_page.on("request", lambda request: note(request.url))
    browser_page.on("websocket", lambda socket: note(socket.url))
    browser_page.goto(served.address)
    browser_page.wait_for_selector("#find")
    yield browser_page
    assert not outside


def photo(path: Path, seed: int) -> Path:
    """A red rectangle on grey noise, 160 x 100."""
    image = np.random.default_rng(seed).integers(90, 130, (100, 160, 3)).astype(np.uint8)
    image[20:80, 40:120] = (220, 30, 30)
    Image.fromarray(image).save(path)
    return path


def upload(page: Page, where: str, *files: Path) -> None:
    page.set_input_files(f"{where} input[type=file]", [str(file) for file in files])


def drag(page: Page, *places: tuple[float, float]) -> None:
    """On the photo to be marked, through places given as parts of its sides."""
    canvas = page.locator("#marking canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in places]
    page.mouse.move(*points[0])
    page.mouse.down()
    for point in points[1:]:
        page.mouse.move(*point, steps=4)
    page.mouse.up()


def share(page: Page) -> str:
    return page.locator(".result header span").first.inner_text()


def test_paint_find_cut_and_take_away(opened: Page, tmp_path: Path) -> None:
    page = opened
    upload(page, "#examples", photo(tmp_path / "shown.png", 0))
    page.wait_for_selector("#marking canvas")
    upload(page, "#queries", photo(tmp_path / "b.png", 1), photo(tmp_path / "c.jpg", 2))
    page.get_by_text("2 photos to search").wait_for()
    page.click("#find")
    page.get_by_text("nothing is painted yet").wait_for()

    page.get_by_role("button", name="Brush", exact=True).click()
    page.locator(".fss-size input").fill("20")
    drag(page, (0.3, 0.35), (0.7, 0.35), (0.7, 0.65), (0.3, 0.65), (0.3, 0.5), (0.7, 0.5))
    page.fill("#name input, #name textarea", "red <b>box</b>")
    page.click("#find")
    page.locator(".result img").nth(3).wait_for()
    assert page.locator(".result").count() == 2
    assert page.locator("#find-notes .problem").count() == 0
    assert share(page).startswith("red <b>box</b>: ")  # as it was typed
    mask, attention = (page.locator(".result img").nth(k).get_attribute("src") for k in range(2))
    assert mask != attention

    slider = page.locator("#threshold input[type=number]")
    slider.fill("-19")
    slider.press("Enter")
    page.get_by_text(re.compile("100% of the photo")).first.wait_for()
    assert page.locator(".result img").nth(0).get_attribute("src") != mask
    assert page.locator(".result img").nth(1).get_attribute("src") == attention
    slider.fill("20")
    slider.press("Enter")
    page.get_by_text("at this threshold").first.wait_for()
    slider.fill("0.3")
    slider.press("Enter")
    page.get_by_text("at this threshold").first.wait_for(state="detached")

    page.click("#make")
    page.locator("#downloads a").nth(2).wait_for()
    files = {}
    for number in range(3):
        with page.expect_download() as waiting:
            page.locator("#downloads a").nth(number).click()
        files[waiting.value.suggested_filename] = waiting.value.path()
    assert set(files) == {"red_b_box_b-masks.zip", "instances.json", "red_b_box_b.safetensors"}
    with zipfile.ZipFile(files["red_b_box_b-masks.zip"]) as archive, archive.open("masks/b.png") as file:
        assert np.array(Image.open(file)).shape == (100, 160)
    assert len(json.loads(files["instances.json"].read_bytes())["images"]) == 2
    page.get_by_text("--support-set red_b_box_b.safetensors --threshold 0.3").wait_for()


def test_broken_and_excess_files_get_a_message(opened: Page, tmp_path: Path) -> None:
    page = opened
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff this is no photo")
    upload(page, "#queries", broken, photo(tmp_path / "fine.png", 1))
    page.get_by_text("broken.jpg: photo cannot be decoded").wait_for()
    page.get_by_text("1 photo to search").wait_for()
    upload(page, "#examples", broken, *(photo(tmp_path / f"{k}.png", k) for k in range(3)))
    page.get_by_text("2.png: left out, 2 examples are enough").wait_for()
    assert page.locator("#example-notes .problem").count() == 2
    assert page.locator(".fss-photos button").count() == 2
    assert "Traceback" not in page.content()
    page.get_by_role("button", name="Remove photo", exact=True).click()
    page.locator(".fss-photos").wait_for(state="detached")
    page.locator("#marking canvas").wait_for()


def test_other_marks(opened: Page, tmp_path: Path) -> None:
    page, seen = opened, set()
    upload(page, "#examples", photo(tmp_path / "shown.png", 0))
    upload(page, "#queries", photo(tmp_path / "b.png", 1))
    page.get_by_text("1 photo to search").wait_for()
    for number, (kind, places) in enumerate(
        {
            "Box": [(0.2, 0.2), (0.8, 0.8)],
            "Point": [(0.5, 0.5)],
            "Scribble": [(0.4, 0.4), (0.6, 0.6)],
            "Only the photo": [],
        }.items()
    ):
        page.get_by_role("button", name=kind, exact=True).click()
        if places:
            drag(page, *places)
        page.fill("#name input, #name textarea", f"search {number}")
        page.click("#find")
        page.locator(f".result img[alt*='search {number}']").wait_for()
        seen.add(page.locator(".result img").nth(1).get_attribute("src"))
    assert len(seen) == 4  # attention follows what was shown


def test_example_at_phone_width(opened: Page) -> None:
    page = opened
    page.set_viewport_size({"width": 360, "height": 740})
    page.click("#try")
    page.locator(".result img").nth(5).wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    canvas = page.locator("#marking canvas").bounding_box()
    assert canvas is not None
    assert canvas["x"] >= 0
    assert canvas["x"] + canvas["width"] <= 360
    nameless = page.evaluate(
        "[...document.querySelectorAll('button, input')].filter(e => e.offsetParent && !e.innerText.trim()"
        " && !e.ariaLabel && !e.labels?.length && !e.title && !e.querySelector('img')).map(e => e.outerHTML)"
    )
    assert nameless == []
    page.click("#again")
    page.get_by_text("Your example photo comes here").wait_for()
    assert page.locator(".result").count() == 0


def test_a_closed_page_is_freed(served: Served, opened: Page) -> None:
    page = opened

    def wait_for_none() -> None:
        for _ in range(200):
            if not len(served.sessions):
                return
            page.wait_for_timeout(100)

    wait_for_none()  # those of the tests before
    assert len(served.sessions) == 0
    page.click("#try")
    page.locator(".result img").nth(5).wait_for()
    page.click("#make")
    page.locator("#downloads a").nth(2).wait_for()
    assert len(served.sessions) == 1
    assert list(served.folder.rglob("*.zip"))
    page.goto("about:blank")
    wait_for_none()
    assert len(served.sessions) == 0
    page.wait_for_timeout(500)  # it is counted out before its folders are deleted
    assert not list(served.folder.rglob("*.zip"))
    assert not list(served.folder.glob("session-*"))


def test_what_is_asked_for_during_a_search_is_told_of_it(served: Served, opened: Page, tmp_path: Path) -> None:
    page = opened
    upload(page, "#queries", photo(tmp_path / "searched.png", 1))
    page.get_by_text("1 photo to search").wait_for()
    session = list(served.sessions._kept.values())[-1][0]
    with session.turn("searching"):
        page.click("#clear")
        page.get_by_text("still searching: wait until that is done").wait_for()
        upload(page, "#examples", photo(tmp_path / "shown.png", 0))
        page.locator("#example-notes").get_by_text("still searching").wait_for()
        page.click("#find")
        page.locator("#find-notes").get_by_text("still searching").wait_for()
    assert len(session.queries) == 1
    page.click("#clear")
    page.locator("#query-notes").get_by_text("searched.png").wait_for(state="detached")
    assert not session.queries


def test_another_own_address_and_a_proxy_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'fewshot-seg[app]'")
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux has all of 127.0.0.0/8 for its own")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    segmenter = training_free(build_backbone("mobilenetv3_small_050", weights="random")).eval()
    engine = Engine(segmenter=segmenter, resolution=64, fit="squash", name="tiny")
    with serve(engine, host="127.0.0.2") as page:
        for headers, status in (({}, 200), ({"Host": "evil.example"}, 400)):
            connection = HTTPConnection(urlsplit(page.address).netloc, timeout=120)
            connection.request("GET", "/", headers=headers)
            assert connection.getresponse().status == status
            connection.close()


def test_a_port_that_is_taken_gets_one_line(served: Served) -> None:
    segmenter = training_free(build_backbone("mobilenetv3_small_050", weights="random")).eval()
    engine, port = Engine(segmenter=segmenter, resolution=64, fit="squash", name="tiny"), urlsplit(served.address).port
    with pytest.raises(DataError, match="cannot listen at"), serve(engine, port=port):
        pass


class TestGuard:
    """What the server says to requests that no page of ours sends."""

    @pytest.mark.parametrize(
        "path",
        [
            "/gradio_api/file=/etc/passwd",
            "/gradio_api/file=../../../../etc/passwd",
            "/gradio_api/file=%2e%2e%2f%2e%2e%2fetc%2fpasswd",
            "/static/../../../../etc/passwd",
            "/assets/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
            "/gradio_api/file=pyproject.toml",
        ],
    )
    def test_no_file_of_the_machine(self, served: Served, path: str) -> None:
        connection = HTTPConnection(urlsplit(served.address).netloc, timeout=120)
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        assert answer.status in (400, 403, 404)
        assert b"root:" not in body

    def test_uploads_are_bounded(self, served: Served) -> None:
        form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n%s\r\n--x--\r\n'
        statuses = []
        for size in (1_000, LIMITS.file_bytes + 10_000, LIMITS.queries * LIMITS.file_bytes + 2_000_000):
            request = urllib.request.Request(
                f"{served.address}gradio_api/upload",
                data=form % (b"0" * size),
                headers={"Content-Type": "multipart/form-data; boundary=x"},
            )
            try:
                with urllib.request.urlopen(request, timeout=120) as answer:
                    statuses.append(answer.status)
            except urllib.error.HTTPError as error:
                statuses.append(error.code)
            except urllib.error.URLError:  # the server hung up before all was sent
                statuses.append(413)
        assert statuses == [200, 413, 413]

    def test_another_name_for_this_machine_is_not_let_in(self, served: Served) -> None:
        connection = HTTPConnection(urlsplit(served.address).netloc, timeout=120)
        connection.request("GET", "/", headers={"Host": "evil.example"})
        assert connection.getresponse().status == 400
        connection.close()

    def test_the_browser_is_kept_at_home(self, served: Served) -> None:
        with urllib.request.urlopen(served.address, timeout=120) as answer:
            policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'self'")
        assert "http" not in policy
