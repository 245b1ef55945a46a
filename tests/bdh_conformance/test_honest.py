"""Ports on cases of several seeds: the honest are left alone, and others are not."""

import pytest
from click.testing import CliRunner

from bdh_conformance.adversaries.legal import LEGAL
from bdh_conformance.adversaries.mistakes import MISTAKES
from bdh_conformance.honest import hear, main


def test_a_legal_variant_is_heard_on_drawn_cases_alone() -> None:
    heard = hear(next(iter(LEGAL)), 1, 0.05)
    assert heard.cases > 10
    assert heard.accusations == ()


def test_a_port_with_a_mistake_is_accused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LEGAL, "wrong", MISTAKES["variance_unbiased"])
    heard = hear("wrong", 1, 0.05)
    assert "variance_unbiased differs from the specification at" in heard.accusations[0]


def test_nothing_heard_is_no_verdict() -> None:
    result = CliRunner().invoke(main, ["--ports", "", "--no-legal", "--seeds", "1"])
    assert result.exit_code == 1
    assert "0 generated cases" in result.stdout


@pytest.mark.parametrize("seeds", ["one", ""])
def test_seeds_are_whole_numbers(seeds: str) -> None:
    assert CliRunner().invoke(main, ["--seeds", seeds, "--minutes", "0.01"]).exit_code == 2
