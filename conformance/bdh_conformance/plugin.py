"""The suite inside pytest: pytest -p bdh_conformance.plugin --pyargs bdh_conformance.suite --bdh-backend jax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bdh_conformance import known, report
from bdh_conformance.channels import CHANNELS
from bdh_conformance.isolation import Isolated, Limits, Request, memory_of_the_machine
from bdh_conformance.outcomes import Result
from bdh_conformance.plan import TIERS, Check
from bdh_conformance.ports import find_port
from bdh_conformance.runner import Run
from bdh_spec import BDHError
from bdh_spec.dtypes import DTYPES
from bdh_spec.rope import PHASES

RUN = pytest.StashKey[Run]()
CHECKS = pytest.StashKey[list[Check]]()
KNOWN = pytest.StashKey[list[known.Known]]()
BASELINE = pytest.StashKey[dict[str, Any] | None]()
ISOLATED = pytest.StashKey[Isolated | None]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bdh", "BDH conformance")
    group.addoption("--bdh-backend", metavar="PORT", help="A registered port, or package.module:Class.")
    group.addoption("--bdh-tier", choices=tuple(TIERS), default="standard", help="How much to look at.")
    group.addoption("--bdh-device", metavar="NAME", help="Such as cpu, cuda, mps.")
    group.addoption("--bdh-dtype", metavar="LIST", default="", help="Dtypes to check, separated by commas.")
    group.addoption("--bdh-channel", metavar="LIST", default="", help="Channels to check, separated by commas.")
    group.addoption("--bdh-phase", choices=PHASES, help="Phases to check.")
    group.addoption("--bdh-known", type=Path, metavar="FILE", help="Known failures; one that passes is an error.")
    group.addoption("--bdh-baseline", type=Path, metavar="FILE", help="An earlier --json, to compare with.")
    group.addoption("--bdh-time-limit", type=float, default=120.0, metavar="SECONDS", help="For one case.")
    group.addoption("--bdh-memory-limit", type=float, metavar="GB", help="For the port.  [default: most of the machine's]")
    group.addoption("--bdh-in-process", action="store_true", help="Run the port in this process, for a debugger.")
    group.addoption("--bdh-seed", type=int, help="Draw other generated cases.")


def pytest_collection(session: pytest.Session) -> None:
    """A port that there is not is misuse, and no failure of a test."""
    if session.config.getoption("--bdh-backend"):
        planned(session.config)


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
            prepare(config, name)
        except (BDHError, known.KnownError) as error:
            raise pytest.UsageError(str(error)) from None
    return config.stash[CHECKS]


def prepare(config: pytest.Config, name: str) -> None:
    """The port as it introduces itself, what is known of it, and what it is asked."""
    path, earlier = config.getoption("--bdh-known"), config.getoption("--bdh-baseline")
    config.stash[KNOWN] = known.read(path) if path else []
    config.stash[BASELINE] = report.read_baseline(earlier) if earlier else None
    dtypes, channels = words(config, "--bdh-dtype", DTYPES), words(config, "--bdh-channel", tuple(CHANNELS))
    phase, device, seed = (config.getoption(f"--bdh-{option}") for option in ("phase", "device", "seed"))
    tier = config.getoption("--bdh-tier")
    request = Request(name, tier, device, seed, tuple(dtypes), tuple(channels), (phase,) if phase else ())
    gigabytes = config.getoption("--bdh-memory-limit") or 0.8 * memory_of_the_machine()
    limits = Limits(config.getoption("--bdh-time-limit"), gigabytes)
    isolated = None if config.getoption("--bdh-in-process") else Isolated(request, limits)
    config.stash[ISOLATED] = isolated
    config.stash[RUN] = Run(isolated.introduced() if isolated else find_port(name), device, seed, name)
    config.stash[CHECKS] = request.checks(config.stash[RUN].backend)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """What moved since the baseline."""
    before = config.stash.get(BASELINE, None)
    if before is not None and (results := config.stash[RUN].results):
        for change in report.compare_with({"checks": [result.as_dict() for result in results]}, before):
            terminalreporter.write_line(report.moved(change))


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the port's process."""
    if isolated := config.stash.get(ISOLATED, None):
        isolated.stop()


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
def bdh_result(pytestconfig: pytest.Config, bdh_check: Check) -> Result:
    """What came of a check."""
    stash, number = pytestconfig.stash, planned(pytestconfig).index(bdh_check)
    run, isolated = stash[RUN], stash[ISOLATED]
    return isolated.found(run, number, bdh_check) if isolated else run.run(bdh_check)


@pytest.fixture
def bdh_known(pytestconfig: pytest.Config) -> list[known.Known]:
    """The failures that the port's people know."""
    planned(pytestconfig)
    return pytestconfig.stash[KNOWN]
