"""The suite inside pytest: pytest -p bdh_conformance.plugin --pyargs bdh_conformance.suite --bdh-backend jax."""

from __future__ import annotations

import pytest

from bdh_conformance.cli import find_port
from bdh_conformance.plan import TIERS, Check, plan
from bdh_conformance.runner import Run

RUN = pytest.StashKey[Run]()
CHECKS = pytest.StashKey[list[Check]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bdh", "BDH conformance")
    group.addoption("--bdh-backend", metavar="PORT", help="A registered port, or package.module:Class.")
    group.addoption("--bdh-tier", choices=tuple(TIERS), default="standard", help="How much to look at.")
    group.addoption("--bdh-device", metavar="NAME", help="Such as cpu, cuda, mps.")
    group.addoption("--bdh-dtype", metavar="LIST", default="", help="Dtypes to check, separated by commas.")
    group.addoption("--bdh-seed", type=int, help="Draw other generated cases.")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each check of the plan."""
    if "bdh_check" in metafunc.fixturenames:
        checks = planned(metafunc.config)
        metafunc.parametrize("bdh_check", checks, ids=[identity(check) for check in checks])


def planned(config: pytest.Config) -> list[Check]:
    """The checks of this session; the port is loaded once."""
    if CHECKS not in config.stash:
        name = config.getoption("--bdh-backend")
        if not name:
            raise pytest.UsageError("--bdh-backend is missing: name a port, such as torch or mypkg.port:MyBackend")
        backend = find_port(name)
        dtypes = [word for word in config.getoption("--bdh-dtype").split(",") if word]
        config.stash[RUN] = Run(backend, config.getoption("--bdh-device"), config.getoption("--bdh-seed"), name)
        config.stash[CHECKS] = plan(TIERS[config.getoption("--bdh-tier")], backend.capabilities, dtypes=dtypes)
    return config.stash[CHECKS]


def identity(check: Check) -> str:
    return f"{check.channel.name}-{check.dtype}" + ("-float32_phases" if check.phase == "float32" else "")


@pytest.fixture
def bdh_run(pytestconfig: pytest.Config) -> Run:
    """The port under test and what is known of it so far."""
    planned(pytestconfig)
    return pytestconfig.stash[RUN]
