"""One test for each channel, dtype and phase, and at last whether what was known came true and enough was looked at."""

from __future__ import annotations

import pytest

from bdh_conformance import known
from bdh_conformance.outcomes import BAD, Result
from bdh_conformance.runner import Run


def test_port_agrees(bdh_result: Result, bdh_known: list[known.Known]) -> None:
    result = bdh_result
    if result.status == "not claimed":
        pytest.skip(f"not claimed: {result.reason}")
    expected = next((entry for entry in bdh_known if entry.id == result.id), None)
    if result.status in BAD and expected is not None:
        pytest.xfail(f"known failure: {expected.reason} ({expected.link})")
    if result.status in BAD and result.worst:
        pytest.fail(result.worst.message, pytrace=False)


def test_what_is_known_to_fail_fails(bdh_run: Run, bdh_known: list[known.Known]) -> None:
    assert known.excuse(bdh_run.results, bdh_known) == []


def test_something_was_checked(bdh_run: Run) -> None:
    checked = [result for result in bdh_run.results if result.status != "not claimed"]
    assert checked, "nothing was checked: the port claims nothing that was asked for"
    if all(result.status == "passed" for result in checked) and "logits" in {result.channel for result in checked}:
        missing = [item for item, count in bdh_run.coverage.items() if not count]  # a check stops at its first failure
        assert not missing, f"no case had {', '.join(missing)}"
