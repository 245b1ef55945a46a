"""The site of `make docs`: strict, whole, offline, with notebooks that have run; and the first screen of the README."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pages
import pytest
from chromium import Page
from filelock import FileLock
from markdown_it import MarkdownIt

ROOT = pages.ROOT
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
# What a browser asks for by itself; a link waits until it is followed.
FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src", "object": "data"}
FETCHED_LINKS = {"stylesheet", "icon", "preload", "preconnect", "dns-prefetch", "prefetch", "modulepreload", "manifest"}
# GitHub's column is this wide in a window of 1,300 pixels; its letters are the system's, 16 pixels high, and code is smaller.
GITHUB = """
body { max-width: 852px; margin: 0; padding: 24px 32px; font: 16px/1.5 system-ui, sans-serif; word-wrap: break-word }
h1 { font-size: 2em; margin: 0 0 16px; padding-bottom: .3em; border-bottom: 1px solid; line-height: 1.25 }
p, pre { margin: 0 0 16px } img { max-width: 100%; vertical-align: middle }
pre { padding: 16px; overflow: auto; font: 13.6px/1.45 monospace } code { font: inherit }
"""
WINDOW = 1300, 900


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built by the first worker that wants it."""
    held = tmp_path_factory.getbasetemp()
    held = held.parent if "PYTEST_XDIST_WORKER" in os.environ else held
    with FileLock(held / "site.lock"):
        if not (held / "site").exists():
            build(held / "site.new")
            (held / "site.new").rename(held / "site")
    return held / "site"


def build(folder: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    told = os.environ | {"NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=told, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


class Asked(HTMLParser):
    """What a page has a browser fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        held = dict(attrs)
        if tag in FETCHED:
            self.found.append(held.get(FETCHED[tag]) or "")
        if tag == "link" and FETCHED_LINKS & set((held.get("rel") or "").split()):
            self.found.append(held.get("href") or "")


def asked_by_page(text: str) -> list[str]:
    parser = Asked()
    parser.feed(text)
    return [*parser.found, *asked_by_style(text)]


def asked_by_style(text: str) -> list[str]:
    return re.findall(r"(?:url\(|@import\s+)[\"']?([^\"')]+)", text)


def elsewhere(asked: list[str]) -> list[str]:
    return [address for address in asked if re.match(r"(\w+:)?//", address)]


def test_the_site_asks_no_other_host_for_anything(site: Path) -> None:
    pages_of_it = [page.read_text(encoding="utf-8") for page in site.rglob("*.html")]
    asked = [address for page in pages_of_it for address in asked_by_page(page)]
    asked += [address for style in site.rglob("*.css") for address in asked_by_style(style.read_text(encoding="utf-8"))]
    assert len(asked) > 100
    assert elsewhere(asked) == []
    assert not any('data-md-component="source"' in page for page in pages_of_it), "GitHub would be asked for stars"


@pytest.mark.parametrize(
    "page",
    [
        '<script src="https://example.org/a.js"></script>',
        '<img alt="" src="//example.org/a.png">',
        '<link rel="preconnect" href="https://example.org">',
        '<link rel="icon stylesheet" href="https://example.org/a.css">',
        "<style>@import 'https://example.org/a.css';</style>",
        "<style>@font-face { src: url(https://example.org/a.woff2) }</style>",
    ],
)
def test_what_another_host_would_be_asked_is_seen(page: str) -> None:
    assert len(elsewhere(asked_by_page(page + '<a href="https://example.org">a link</a>'))) == 1


def test_every_page_is_on_the_site_once_and_can_be_found(site: Path, hook: ModuleType) -> None:
    there = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    lives = {path: page for page, path in hook.PAGES.items()}
    expected = {lives.get(page, page.removeprefix("docs/")) for page in pages.pages() if not page.startswith("tests/")}
    expected |= {f"notebooks/{path.stem}.md" for path in NOTEBOOKS} | {f"api/{name}.md" for name in hook.PACKAGES}
    assert there - {"404.html"} == {page.removesuffix("md") + "html" for page in expected}
    home = (site / "index.html").read_text(encoding="utf-8")
    assert all(f'href="{page}"' in home for page in there - {"404.html", "index.html"}), "the navigation leaves pages out"


def test_links_between_pages_stay_on_the_site(site: Path) -> None:
    model = (site / "model.html").read_text(encoding="utf-8")
    assert 'href="specification.html"' in model
    assert 'href="notebooks/bdh-in-an-hour.html"' in (site / "getting-started.html").read_text(encoding="utf-8")
    assert 'href="specification.html"' in (site / "porting.html").read_text(encoding="utf-8")
    assert 'src="model.svg"' in (site / "index.html").read_text(encoding="utf-8")
    assert "https://github.com/bdh-spec/bdh-spec/tree/main/examples/loops" in (site / "training.html").read_text(
        encoding="utf-8"
    )


def test_notebooks_have_run_and_hold_no_outputs_that_could_grow_old(site: Path) -> None:
    assert {path.stem for path in NOTEBOOKS} >= {"bdh-in-an-hour", "look-inside"}
    for path in NOTEBOOKS:
        cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
        assert len(cells) >= 6
        assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells), f"{path.name} has outputs"
        assert list((site / "notebooks" / path.stem).glob("*.png")), f"{path.name} shows no picture"
    assert "layers.2.x agrees" in (site / "notebooks" / "bdh-in-an-hour.html").read_text(encoding="utf-8")


def test_the_api_shows_docstrings_and_their_examples_as_code(site: Path) -> None:
    page = (site / "api" / "bdh_spec.html").read_text(encoding="utf-8")
    assert 'id="bdh_spec.load"' in page
    assert 'id="bdh_mlx.BDH"' in (site / "api" / "bdh_mlx.html").read_text(encoding="utf-8")
    for name in (site / "api").glob("*.html"):
        assert "<blockquote>\n<blockquote>" not in name.read_text(encoding="utf-8"), f"{name.stem} quotes its examples"


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that brings in what docs/ does not hold."""
    monkeypatch.setenv("BDH_BACKEND", "numpy")
    spec = importlib.util.spec_from_file_location("site_hook", ROOT / ".ci" / "site.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_link_that_leads_nowhere_fails_the_build(hook: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    files = SimpleNamespace(get_file_from_path=lambda path: path in ("training.md", "porting.md", "api/bdh_spec.md"))
    assert hook.target("training.md#data", "docs/model.md", "model.md", files) == "training.md#data"
    assert hook.target("../conformance/PORTING.md", "docs/model.md", "model.md", files) == "porting.md"
    assert hook.target(f"{hook.HOME}/blob/main/docs/training.md", "README.md", "index.md", files) == "training.md"
    assert hook.target("../training.md", "docs/notebooks/a.md", "notebooks/a.md", files) == "../training.md"
    assert hook.target("../examples", "docs/model.md", "model.md", files) == f"{hook.HOME}/tree/main/examples"
    assert hook.target("https://arxiv.org", "README.md", "index.md", files) == "https://arxiv.org"
    with caplog.at_level(logging.WARNING):
        hook.target("nowhere.md", "docs/model.md", "model.md", files)
        hook.target(f"{hook.HOME}/blob/main/nowhere.py", "README.md", "index.md", files)
    assert len([record for record in caplog.records if "not there" in record.message]) == 2


def test_a_page_that_the_navigation_does_not_name_comes_last(hook: ModuleType, tmp_path: Path) -> None:
    for name in ("known.md", "new.md"):
        (tmp_path / name).touch()
    config = hook.on_config(SimpleNamespace(nav=[{"Begin": ["known.md"]}], docs_dir=str(tmp_path)))
    assert config.nav == [{"Begin": ["known.md"]}, {"More": ["new.md"]}]


def test_the_picture_of_the_model_is_what_its_script_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    drawn = importlib.import_module("model_picture").picture()
    assert (ROOT / "docs" / "model.svg").read_text(encoding="utf-8") == drawn
    assert all(word in drawn for word in ("Token", "Sparse code", "Rotation", "State", "Gate", "Back"))


@pytest.fixture
def browser(chromium: Any) -> Page:
    """A page of the browser of this machine."""
    return Page(chromium)


def test_the_first_screen_of_the_readme_fits_one_window(browser: Page, tmp_path: Path) -> None:
    body = MarkdownIt("commonmark").render((ROOT / "README.md").read_text(encoding="utf-8"))
    body = body.replace("https://raw.githubusercontent.com/bdh-spec/bdh-spec/main/", f"{ROOT.as_uri()}/")
    page = tmp_path / "readme.html"
    page.write_text(f'<meta charset="utf-8"><style>{GITHUB}</style>{body}', encoding="utf-8")
    browser.look(*WINDOW)
    browser.open(page)
    parts = [
        "h1",
        "p",
        "img",
        "code.language-console",
        "code.language-python",
        "pre:nth-of-type(3)",
        "a[href*=getting-started]",
    ]
    tops = browser.run(f"{json.dumps(parts)}.map(part => document.querySelector(part).getBoundingClientRect().top)")
    assert tops == sorted(tops), "the order of the first screen is another"
    assert browser.run("[...document.images].every(image => image.naturalWidth > 0)"), "a picture is not there"
    assert browser.run("document.querySelector('a[href*=getting-started]').getBoundingClientRect().bottom") <= WINDOW[1]
    assert browser.run("[...document.querySelectorAll('pre')].every(code => code.scrollWidth <= code.clientWidth)"), (
        "a line is cut"
    )


def test_the_site_is_searched_from_a_disk_without_a_network(browser: Page, site: Path) -> None:
    browser.look(*WINDOW)
    browser.open(site / "index.html")
    browser.click("input[name=query]")
    browser.type("threads")
    browser.press("Shift")  # the search listens to keys
    browser.wait("document.querySelectorAll('.md-search-result__article').length > 0")
    assert "Questions" in browser.run("document.querySelector('.md-search-result__list').textContent")
    assert browser.console == []
