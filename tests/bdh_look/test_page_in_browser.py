"""The page in a real browser: clicks, keys, both widths, both schemes, no errors. Skipped where no browser is installed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import CONTRASTS

import bdh_spec
from bdh_look.causes import causes
from bdh_look.page import TOP, page
from bdh_look.record import record

TEXT = b'The "try" statement specifies exception handlers for a group of\nstatements: see the "try" statement.'


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("page") / "look.html"
    file.write_text(page(bdh_spec.load(backend="numpy"), TEXT), encoding="utf-8")
    return file.as_uri()


@pytest.fixture(params=[(400, "dark"), (1300, "light")], ids=["400 dark", "1300 light"])
def shown(chromium: Any, address: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page at one width and in one scheme; whatever the console says, or the network is asked for, is an error."""
    width, scheme = request.param
    tab = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: None if request.url.startswith(("file:", "data:")) else said.append(request.url))
    tab.goto(address)
    tab.wait_for_selector("html[data-ready]")
    yield tab
    tab.close()
    assert said == []


def text_of(tab: Any, selector: str) -> str:
    return str(tab.inner_text(selector))


def picked(tab: Any) -> int:
    return int(tab.get_attribute("#text", "aria-activedescendant")[1:])


def test_a_click_on_a_letter_shows_what_its_prediction_came_from(shown: Any) -> None:
    model = bdh_spec.load(backend="numpy")
    seen = record(model, TEXT)
    earlier, _, left = causes(model, seen, TOP["causes"])
    time = TEXT.rindex(b"atement") + 3
    shown.click(f"#b{time}")
    assert picked(shown) == time
    likeliest = seen.next_byte.values[time].argmax()
    assert f"the model expects {chr(likeliest)}" in text_of(shown, "#sentence").replace("\xa0", " ")
    assert f"at byte {earlier[time, 0]}" in text_of(shown, "#causes-note")
    assert len(shown.query_selector_all("#causes li")) == 6
    shaded = [i for i in range(len(TEXT)) if shown.evaluate(f"document.getElementById('b{i}').style.getPropertyValue('--r')")]
    assert set(shaded) == set(earlier[time])
    assert left[time, 0] < seen.next_byte.values[time].max() or "against" in str(shown.inner_html("#causes li"))


def test_the_keyboard_is_enough(shown: Any) -> None:
    shown.focus("#text")
    shown.keyboard.press("Home")
    assert picked(shown) == 0
    assert "first byte reads nothing" in text_of(shown, "#read-note")
    for key, at in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", len(TEXT) - 1)):
        shown.keyboard.press(key)
        assert picked(shown) == at
    shown.keyboard.press("ArrowUp")
    assert picked(shown) < len(TEXT) - 1
    shown.focus("#time")
    before = picked(shown)
    shown.keyboard.press("ArrowLeft")
    assert picked(shown) == before - 1
    shown.focus("#layers button")
    shown.keyboard.press("Enter")
    assert shown.evaluate("document.activeElement.id") == "h-neuron"
    assert "Neuron" in text_of(shown, "#h-neuron")
    assert "speaks for" in text_of(shown, "#about-neuron")


def test_a_layer_and_a_head_can_be_chosen(shown: Any) -> None:
    shown.click("#b60")
    shown.click('button[aria-label="layer 1, head 2"]')
    assert shown.get_attribute('button[aria-label="layer 1, head 2"]', "aria-pressed") == "true"
    assert "layer 1, head 2" in text_of(shown, "#read-note")
    assert {row.inner_text() for row in shown.query_selector_all("#synapses td:nth-child(2)")} == {"1"}
    shown.click('button[aria-label="all layers and heads"]')
    assert "all layers and heads" in text_of(shown, "#read-note")


def test_a_row_leads_to_its_byte_and_a_neuron_to_its_partners(shown: Any) -> None:
    shown.click("#b60")
    row = shown.query_selector("#reads button")
    at = int(row.get_attribute("title").split()[-1])
    row.click()
    assert picked(shown) == at
    shown.click("#layers button")
    first = text_of(shown, "#h-neuron")
    shown.click("#about-neuron .chip")
    assert text_of(shown, "#h-neuron") != first


def test_the_slider_follows_the_state(shown: Any) -> None:
    def sizes_at(time: int) -> str:
        shown.evaluate(f"const s = document.getElementById('time'); s.value = {time}; s.dispatchEvent(new Event('input'))")
        return text_of(shown, "#norm0")

    assert sizes_at(10) != sizes_at(50)
    assert picked(shown) == 50
    cursor = shown.evaluate("parseFloat(document.querySelector('.cursor').style.left)")
    assert cursor == pytest.approx((50 + 0.5) / len(TEXT) * 100)


def shaded(tab: Any) -> list[int]:
    found = (
        "[...document.querySelectorAll('#text span')].filter((e) => e.style.getPropertyValue('--r')).map((e) => +e.id.slice(1))"
    )
    return list(tab.evaluate(found))


def test_the_text_is_shaded_by_what_mattered_or_by_what_was_read(shown: Any) -> None:
    shown.click("#b60")
    assert len(shaded(shown)) == TOP["causes"]
    shown.click("[data-shade=reads]")
    assert shown.get_attribute("[data-shade=reads]", "aria-pressed") == "true"
    assert len(shaded(shown)) > TOP["causes"]
    shown.focus("[data-shade=causes]")
    shown.keyboard.press("Enter")
    assert len(shaded(shown)) == TOP["causes"]


def test_synapses_lead_to_their_writers_and_neurons_and_the_course_to_a_byte(shown: Any) -> None:
    shown.click("#b60")
    written = shown.query_selector("#synapses button[title]")
    at = int(written.get_attribute("title").split()[-1])
    written.click()
    assert picked(shown) == at
    shown.click("#b60")
    button = shown.query_selector("#grew button")
    neuron = int(button.get_attribute("data-neuron"))
    button.click()
    n = bdh_spec.read()[1].n_neurons
    assert text_of(shown, "#h-neuron") == f"Neuron {neuron % n} of head {neuron // n}"
    course = shown.locator("canvas.course").first
    course.scroll_into_view_if_needed()
    course.click(position={"x": course.bounding_box()["width"] * 10.5 / len(TEXT), "y": 5})
    assert picked(shown) == 10


@pytest.mark.parametrize("width", [400, 1300])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_window_and_everything_can_be_read(
    chromium: Any, address: str, width: int, scheme: str
) -> None:
    tab = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab.goto(address)
    tab.wait_for_selector("html[data-ready]")
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    ratios = tab.evaluate(CONTRASTS)
    tab.close()
    assert len(ratios) > 100
    assert not [told for told in ratios if told["ratio"] < 4.5], "WCAG's AA"


def test_without_causes_the_page_shows_what_was_read(chromium: Any, tmp_path: Path) -> None:
    file = tmp_path / "look.html"
    file.write_text(page(bdh_spec.load(backend="numpy"), b"The dragon\xff", with_causes=False), encoding="utf-8")
    tab = chromium.new_page()
    errors: list[str] = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(file.as_uri())
    tab.wait_for_selector("html[data-ready]")
    tab.click("#b9")
    assert not tab.is_visible("#causes-section")
    assert not tab.is_visible("#shade")
    assert tab.evaluate("document.getElementById('b8').style.getPropertyValue('--r')")
    tab.close()
    assert errors == []
