"""Both forms of attention pass the conformance suite as ports of their own."""

import importlib.util
from pathlib import Path

import pytest

from bdh_conformance.outcomes import BAD
from bdh_conformance.plan import TIERS, plan
from bdh_conformance.runner import Run

spec = importlib.util.spec_from_file_location("transformers_port", Path(__file__).with_name("port.py"))
port = importlib.util.module_from_spec(spec)
spec.loader.exec_module(port)

PORTS = (port.RecurrentBackend, port.ParallelBackend, port.RecurrentInFloat64, port.ParallelInFloat64)


@pytest.mark.thorough
@pytest.mark.parametrize("backend", [port() for port in PORTS], ids=lambda backend: type(backend).__name__)
def test_each_form_passes_the_standard_tier_in_what_it_claims(backend):
    run = Run(backend)
    results = [run.run(check) for check in plan(TIERS["standard"], backend.capabilities)]
    assert not [result.worst.message for result in results if result.status in BAD]
    assert sum(result.cases for result in results) > 200
