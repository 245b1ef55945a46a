"""The browser of this machine, if it has one, driven by Playwright; and a page in it, as tests want to have it."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FOUND = next((path for name in BROWSERS if (path := shutil.which(name))), None)
# A browser in a container has neither a sandbox nor much shared memory.
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
PATIENCE = 60.0  # seconds until a page that does not come to what is waited for is an error


# The contrast of each text with what lies behind it, where that is one colour.
CONTRASTS = """(() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number).map((v, i) => text.startsWith('color(srgb') && i < 3 ? 255 * v : v);
  const light = (c) => c.slice(0, 3).map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => { const c = rgb(getComputedStyle(e).backgroundColor);
    return c.length < 4 || c[3] === 1 ? c : e.parentElement ? behind(e.parentElement) : [255, 255, 255]; };
  const found = [];
  for (const e of document.querySelectorAll('main *, header *, footer *')) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !e.offsetParent || e.closest('#shades, .strip, :disabled, svg, legend + *')) continue;
    const [a, b] = [light(rgb(getComputedStyle(e).color)), light(behind(e))];
    found.push({ text: e.textContent.trim().slice(0, 40), ratio: (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) });
  }
  return found;
})()"""


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser without a window. Without one here the test is skipped."""
    if FOUND is None:
        pytest.skip(f"no browser is installed here: none of {', '.join(BROWSERS)}")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed, which drives the browser")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=FOUND, args=OPTIONS)
        try:
            yield started
        finally:
            started.close()


class Page:
    """One page; what its console said and which addresses it asked for, of which a page that stands alone has none."""

    def __init__(self, browser: Any) -> None:
        self.page = browser.new_page(viewport={"width": 1300, "height": 900})
        self.console: list[str] = []
        self.page.on("console", lambda message: self.console.append(message.text))
        self.page.on("pageerror", lambda error: self.console.append(error.stack or str(error)))
        self.page.on("request", self._asked)

    def _asked(self, request: Any) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            self.console.append(request.url)

    def open(self, page: Path) -> None:
        self.page.goto(page.resolve().as_uri())

    def run(self, expression: str) -> Any:
        """The value of an expression in the page."""
        return self.page.evaluate(expression)

    def wait(self, condition: str, seconds: float = PATIENCE) -> None:
        """Until a condition in the page holds. (Playwright would ask from within, which the page's policy forbids.)"""
        deadline = time.monotonic() + seconds
        while not self.run(f"!!({condition})"):
            assert time.monotonic() < deadline, f"never came: {condition}"
            self.page.wait_for_timeout(50)

    def type(self, text: str) -> None:
        """Type text as a keyboard does, into what has the focus."""
        self.page.keyboard.insert_text(text)

    def press(self, key: str) -> None:
        self.page.keyboard.press(key)

    def click(self, selector: str) -> None:
        """Click in the middle of an element with the mouse, whatever lies there."""
        self.page.evaluate("selector => document.querySelector(selector).scrollIntoView({block: 'center'})", selector)
        self.page.locator(selector).first.click(force=True)

    def drop(self, *files: Path) -> None:
        """Drop files on the page, as from a folder of the desktop."""
        session = self.page.context.new_cdp_session(self.page)
        data = {"items": [], "files": [str(file.resolve()) for file in files], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "dragOver", "drop"):
            self.page.wait_for_timeout(50)  # for the page to answer, as it does between two movements of a mouse
            session.send("Input.dispatchDragEvent", {"type": kind, "x": 200, "y": 200, "data": data})
        session.detach()

    def look(self, width: int, height: int = 900, scheme: str = "light") -> None:
        """Give the window a size and a colour scheme."""
        self.page.set_viewport_size({"width": width, "height": height})
        self.page.emulate_media(color_scheme=scheme)
