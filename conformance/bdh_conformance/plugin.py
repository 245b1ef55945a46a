"""The suite inside pytest: pytest -p bdh_conformance.plugin --pyargs bdh_conformance.suite --bdh-backend jax."""

from __future__ import annotations

from pathlib import Path

import pytest

from bdh_conformance import known
from bdh_conformance.channels import CHANNELS
from bdh_conformance.plan import TIERS, Check, plan
from bdh_conformance.ports import find_port
from bdh_conformance.runner import Run
from bdh_spec import BDHError
from bdh_spec.dtypes import DTYPES
from bdh_spec.rope import PHASES

RUN = pytest.StashKey[Run]()
CHECKS = pytest.StashKey[list[Check]]()
KNOWN = pytest.StashKey[list[known.Known]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bdh", "BDH conformance")
    group.addoption("--bdh-backend", metavar="PORT", help="A registered port, or package.module:Class.")
    group.addoption("--bdh-tier", choices=tuple(TIERS), default="standard", help="How much to look at.")
    group.addoption("--bdh-device", metavar="NAME", help="Such as cpu, cuda, mps.")
    group.addoption("--bdh-dtype", metavar="LIST", default="", help="Dtypes to check, separated by commas.")
    group.addoption("--bdh-channel", metavar="LIST", default="", help="Channels to check, separated by commas.")
    group.addoption("--bdh-phase", choices=PHASES, help="Phases to check.")
    group.addoption("--bdh-known", type=Path, metavar="FILE", help="Known failures; one that passes is an error.")
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
        try:
            backend = find_port(name)
            config.stash[KNOWN] = known.read(path) if (path := config.getoption("--bdh-known")) else []
        except (BDHError, known.KnownError) as error:
            raise pytest.UsageError(str(error)) from None
        dtypes, channels = words(config, "--bdh-dtype", DTYPES), words(config, "--bdh-channel", tuple(CHANNELS))
        phases = [config.getoption("--bdh-phase")] if config.getoption("--bdh-phase") else []
        config.stash[RUN] = Run(backend, config.getoption("--bdh-device"), config.getoption("--bdh-seed"), name)
        config.stash[CHECKS] = plan(
            TIERS[config.getoption("--bdh-tier")], backend.capabilities, dtypes=dtypes, channels=channels, phases=phases
        )
    return config.stash[CHECKS]


def words(config: pytest.Config, option: str, names: tuple[str, ...]) -> list[str]:
    """A list separated by commas, of names that exist."""
    found = [word for word in config.getoption(option).split(",") if word]
    if unknown := [word for word in found if word not in names]:
        raise pytest.UsageError(f"{option}: {unknown[0]!r} is none of {', '.join(names)}")
    return found


def identity(check: Check) -> str:
    return f"{check.channel.name}-{check.dtype}" + ("-float32_phases" if check.phase == "float32" else "")


@pytest.fixture
def bdh_run(pytestconfig: pytest.Config) -> Run:
    """The port under test and what is known of it so far."""
    planned(pytestconfig)
    return pytestconfig.stash[RUN]


@pytest.fixture
def bdh_known(pytestconfig: pytest.Config) -> list[known.Known]:
    """The failures that the port's people know."""
    planned(pytestconfig)
    return pytestconfig.stash[KNOWN]
