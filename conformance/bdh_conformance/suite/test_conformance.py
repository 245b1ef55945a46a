"""One test for each channel, dtype and phase, and at last whether anything was looked at."""

from __future__ import annotations

import pytest

from bdh_conformance.outcomes import BAD
from bdh_conformance.plan import Check
from bdh_conformance.runner import Run


def test_port_agrees(bdh_run: Run, bdh_check: Check) -> None:
    result = bdh_run.run(bdh_check)
    if result.status == "not claimed":
        pytest.skip(f"not claimed: {result.reason}")
    if result.status in BAD and result.worst:
        pytest.fail(result.worst.message, pytrace=False)


def test_something_was_checked(bdh_run: Run) -> None:
    checked = [result for result in bdh_run.results if result.status != "not claimed"]
    assert checked, "nothing was checked: the port claims nothing that was asked for"
    missing = [item for item, count in bdh_run.coverage.items() if not count]
    whole = {result.channel for result in checked} >= {"logits"}
    assert not (whole and missing), f"no case had {', '.join(missing)}"
