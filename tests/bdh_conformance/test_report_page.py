"""The page of a run: its plots, what moved, what is folded, and whether it stays inside a narrow window."""

import re
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from bdh_conformance import plots, report
from bdh_conformance.adversaries.mistakes import MISTAKES
from bdh_conformance.channels import CHANNELS
from bdh_conformance.plan import Check
from bdh_conformance.runner import Run
from bdh_conformance.yardstick.agreement import compare
from bdh_conformance.yardstick.cases import Case
from bdh_conformance.yardstick.tolerances import Expectation
from bdh_spec import get_backend


def made(backend: Any, *checks: Check) -> dict[str, Any]:
    run = Run(backend, explains=False)
    for check in checks:
        run.run(check)
    return report.document(run, "standard", [], 1.0, whole=False)


def a_check(channel: str, *cases: str, reason: str = "", dtype: str = "float32") -> Check:
    fixed = tuple(Case.parse(case) for case in cases)
    return Check(CHANNELS[channel], CHANNELS[channel].level, dtype, "exact", fixed, reason=reason)


LONG = "B1 T20 L1 h1 D4 N8 V7 m2 seed=1 scale=5.0"
UNCLAIMED = a_check("padding", reason="the port does not claim <padded>")


@pytest.fixture(scope="module")
def passing() -> dict[str, Any]:
    return made(get_backend("numpy"), a_check("logits", LONG), a_check("traces", LONG), UNCLAIMED)


@pytest.mark.parametrize(("token", "up_to"), [(0, 1), (1, 2), (2, 4), (3, 4), (4, 8)])
def test_errors_are_known_by_position(token: int, up_to: int) -> None:
    reference = np.ones((2, 6, 3))
    actual = reference.copy()
    actual[1, token] += 1e-3
    found = compare("logits", actual, Expectation(reference, 1e-2, 1.0)).by_token
    assert [end for end, _ in found] == [1, 2, 4, 8]
    assert [end for end, ratio in found if ratio > 0] == [up_to]


def test_states_and_slopes_have_no_positions() -> None:
    reference = np.ones((2, 6, 3))
    assert compare("layers.0.state", np.ones((1, 2, 4, 3)), Expectation(np.ones((1, 2, 4, 3)), 1.0, 1.0)).by_token == ()
    assert compare("gradients.encoder", reference, Expectation(reference, 1.0, 1.0)).by_token == ()


def test_a_mistake_that_begins_at_a_length_rises_there() -> None:
    late = made(MISTAKES["state_forgotten_after_512"].backend(), a_check("logits", LONG.replace("T20", "T600")))
    (points,) = plots.by_position(late)["lines"].values()
    assert [point["end"] for point in points if point["ratio"] is None or point["ratio"] > 1] == [1024]
    assert points[-1]["y"] < plots.height(1.0) < points[0]["y"]


def test_every_channel_has_its_dot_and_what_is_beyond_stands_at_the_edge(passing: dict[str, Any]) -> None:
    wrong = made(MISTAKES["rotation_backwards"].backend(), a_check("logits", LONG))
    assert [row["channel"] for row in plots.by_channel(passing, None)] == ["logits", "traces"]
    (dot,) = plots.by_channel(wrong, None)[0]["dots"]
    assert dot["x"] == 100
    assert dot["over"]
    was = plots.by_channel(passing, wrong)[0]["dots"][0]["was"]
    assert was == 100


def test_what_moved_either_way_is_told(passing: dict[str, Any]) -> None:
    before = {"checks": [{"id": "logits/float32", "status": "passed", "ratios": {}, "worst": {"ratio": 0.9}}]}
    rows = {row["id"]: row for row in plots.moved(passing, before)}
    assert rows["logits/float32"]["nearer"] is False
    assert rows["traces/float32"]["now"] == "new"
    assert plots.moved(passing, passing) == []


def test_the_page_is_whole_and_folds_what_is_not_claimed(passing: dict[str, Any]) -> None:
    page = report.page(passing, report.Since("before.json", passing, []))
    for drawing in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(drawing)
    folded = page[page.index("<details>") : page.index("</details>")]
    assert "does not claim &lt;padded&gt;: padding" in folded
    table = page[page.index('<table class="map">') : page.index("</table>")]
    assert "padding" not in table
    assert "Nothing is three times nearer" in page
    assert f"How many of the {sum(check['cases'] for check in passing['checks'])} cases" in page
    assert 'name="viewport"' in page
    assert not re.search(
        r'\b(src|href)=|min-width: [5-9]\d\dpx|<svg width="\d{3,}"', page
    )  # nothing from elsewhere, nothing fixed
