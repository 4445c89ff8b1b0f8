"""The built site in headless Chromium, driven by Playwright.

The browser is the one that FORWAX_BROWSER names, one on PATH, or that of Playwright; FORWAX_SITE
names the folder of the built site.
"""

import functools
import http.server
import io
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

playwright = pytest.importorskip(
    "playwright.sync_api", reason="needs pip install 'forwax[browser]'"
)
DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(
    path.relative_to(DOCS).with_suffix("").as_posix()
    for path in DOCS.rglob("*.md")
    if not {"_build", "jupyter_execute"} & set(path.parts) and path.stem != "404"
)
DRAWN = [
    page
    for page in PAGES
    if page
    in ("index", "guide", "how-to-choose", "faq", "api", "results/compare-digits")
    or page.startswith("gallery")
]
"""Pages of which each pixel is looked at; of the others the styles and sizes are."""
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WHITE = 235
"""Grey from here on is white."""
BOX = 24
"""Pixels of the side of what is no letter."""
BAND = 3000
"""Pixels of the height of one screenshot."""

LOST = """() => {
    const wide = element => element.scrollWidth > element.clientWidth + 1;
    const roots = [document.documentElement, document.querySelector('.content')];
    const clips = [...document.querySelectorAll('article *')].filter(element =>
        element.clientWidth > 1
        && ['hidden', 'clip'].includes(getComputedStyle(element).overflowX));
    return [...roots, ...clips].filter(wide).map(element => element.outerHTML.slice(0, 200));
}"""
"""What is wider than the page, or cut where nothing scrolls."""

UNSEEN = """() => [...document.querySelectorAll('article *')].filter(element => {
    const style = getComputedStyle(element);
    return element.scrollWidth > element.clientWidth + 1
        && ['auto', 'scroll'].includes(style.overflowX)
        && !style.backgroundAttachment.includes('local');
}).map(element => element.outerHTML.slice(0, 200))"""
"""What scrolls without the shadows that show it."""


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder without a word, and its 404.html for what it lacks."""

    def log_message(self, *args: object) -> None:
        pass

    def send_error(self, code: int, *args: object, **options: object) -> None:
        page = Path(self.directory, "404.html").read_bytes()
        self.send_response(code)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        own = driver.chromium.executable_path
        names = os.environ.get("FORWAX_BROWSER"), *map(shutil.which, NAMES), own
        found = next(filter(None, names))
        if found == own and not Path(own).exists():
            pytest.skip("no Chromium in FORWAX_BROWSER, on PATH or of Playwright's own")
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def site(browser):
    """The address of the built site."""
    folder = os.environ.get("FORWAX_SITE")
    if folder is None:
        pytest.skip("FORWAX_SITE names no built site")
    handler = functools.partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def visit(browser, site):
    """A function that opens a page; what goes wrong while pages are open fails the test."""
    wrong, contexts = [], []

    def visit(page, width=1280, scheme="light"):
        contexts.append(
            browser.new_context(
                viewport={"width": width, "height": 900}, color_scheme=scheme
            )
        )
        tab = contexts[-1].new_page()
        tab.on("console", lambda said: said.type == "error" and wrong.append(said.text))
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on(
            "request",
            lambda asked: (
                asked.url.startswith((site, "data:")) or wrong.append(asked.url)
            ),
        )
        tab.goto(f"{site}/{page}")
        tab.wait_for_load_state("networkidle")
        return tab

    visit.wrong = wrong
    yield visit
    for context in contexts:
        context.close()
    assert wrong == []


BRIGHT = """() => [...document.querySelectorAll('body *')].filter(element => {
    const [r, g, b, a = 1] =
        getComputedStyle(element).backgroundColor.match(/[\\d.]+/g).map(Number);
    return a > 0.5 && Math.min(r, g, b) > 200 && element.clientWidth > 1;
}).map(element => element.outerHTML.slice(0, 200))"""
"""What has a light ground."""


def grey(image: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image)).convert("L"))


def has_white_box(tab) -> bool:
    """Whether any square of the page, with a side of BOX, is white."""
    width, height = tab.evaluate("[innerWidth, document.documentElement.scrollHeight]")
    for top in range(0, height - BOX, BAND):
        part = {"x": 0, "y": top, "width": width, "height": min(BAND, height - top)}
        pixels = grey(tab.screenshot(full_page=True, clip=part))
        rows, columns = (size // BOX for size in pixels.shape)
        squares = pixels[: rows * BOX, : columns * BOX].reshape(rows, BOX, columns, BOX)
        if squares.min(axis=(1, 3)).max() >= WHITE:
            return True
    return False


def choose(tab, theme: str) -> None:
    """Turn the page's own switch until it says so."""
    for _ in range(3):
        if tab.locator("body").get_attribute("data-theme") == theme:
            return
        tab.locator(".theme-toggle:visible").first.click()
    raise AssertionError(f"the switch has no {theme}")


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("page", PAGES)
def test_page_fits_and_is_dark_where_the_system_is(page, width, visit):
    tab = visit(f"{page}.html", width, "dark")
    assert tab.evaluate(LOST) == []
    assert tab.evaluate(UNSEEN) == []
    assert tab.evaluate(BRIGHT) == []
    if page in DRAWN:
        assert not has_white_box(tab)


@pytest.mark.parametrize("page", DRAWN)
def test_dark_and_light_by_the_switch(page, visit):
    tab = visit(f"{page}.html")
    choose(tab, "dark")
    assert not has_white_box(tab)
    tab.reload()
    assert tab.locator("body").get_attribute("data-theme") == "dark"
    tab = visit(f"{page}.html", scheme="dark")
    choose(tab, "light")
    assert has_white_box(tab)


def test_a_wide_table_shows_that_it_scrolls(visit):
    tab = visit("results/compare-digits.html", 390)
    box = tab.locator(".table-wrapper").first
    assert box.evaluate("box => box.scrollWidth - box.clientWidth") > 100

    def edges():
        """How dark the left and the right edge are in the lowest row, where no text is."""
        row = 255 - grey(box.screenshot())[-3].astype(int)
        return row[:4].max(), row[-4:].max()

    left, right = edges()
    assert left < 10 < 40 < right
    box.evaluate("box => { box.scrollLeft = box.scrollWidth }")
    left, right = edges()
    assert right < 10 < 40 < left


def test_search_by_keyboard_finds_while_loop(visit):
    tab = visit("index.html")
    tab.keyboard.press("/")
    tab.keyboard.type("while_loop")
    tab.keyboard.press("Enter")
    results = tab.locator("#search-results ul.search li a")
    results.first.wait_for()
    assert results.count() >= 3
    for _ in range(60):
        tab.keyboard.press("Tab")
        if tab.evaluate("document.activeElement.closest('#search-results') !== null"):
            break
    tab.keyboard.press("Enter")
    tab.wait_for_url(lambda url: "search.html" not in url)
    assert "while_loop" in tab.locator("article").inner_text()


def test_a_page_that_is_not_there_leads_home(visit):
    tab = visit("no/such/page.html")
    assert tab.title().startswith("There is no such page")
    assert visit.wrong.pop() == (
        "Failed to load resource: the server responded with a status of 404 (Not Found)"
    )
    tab.get_by_role("link", name="Getting started").first.click()
    assert tab.locator("h1").inner_text().startswith("forwax: getting started")


def test_head_of_a_page(visit):
    tab = visit("index.html")
    assert "forward gradients" in (
        tab.locator("meta[name=description]").get_attribute("content") or ""
    )
    assert tab.locator("link[rel~=icon]").get_attribute("href") == "_static/logo.svg"
    assert tab.locator(".sidebar-brand-text").inner_text().startswith("forwax 0.")
    assert tab.locator("img.sidebar-logo").evaluate("logo => logo.naturalWidth") > 0
