"""What is locked: each file by its hash, in the versions that constraints.txt says, and everything that is asked for."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
LOCKS = [ROOT / "requirements.lock", ROOT / ".ci" / "release-tools.lock"]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def entries(lock: Path) -> list[tuple[Requirement, list[str]]]:
    """Every requirement of a lock and its hashes."""
    lines = [line for line in lock.read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    split = [re.split(r"\s+--hash=", line.strip()) for line in joined]
    return [(Requirement(requirement), hashes) for requirement, *hashes in split]


def constraints() -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    pinned = (line.split("==") for line in lines if line)
    return {canonicalize_name(name): version for name, version in pinned}


def asked_for(extra: str) -> list[Requirement]:
    """What an extra of ours asks for, through others of ours."""
    found = []
    for word in PYPROJECT["project"]["optional-dependencies"][extra]:
        requirement = Requirement(word)
        inner = requirement.extras if requirement.name == "bdh-spec" else ()
        found += [one for name in inner for one in asked_for(name)] if inner else [requirement]
    return found


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_every_file_is_locked_by_its_hash_and_no_host_is_named(lock: Path) -> None:
    assert len(entries(lock)) > 50
    for requirement, hashes in entries(lock):
        assert re.fullmatch(r"==[^,*]+", str(requirement.specifier)), requirement
        assert hashes
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", one) for one in hashes), requirement
    assert "://" not in lock.read_text()
    assert not re.search(r"(?m)^\s*-", lock.read_text().replace("    --hash=", ""))


def test_the_lock_has_the_versions_of_the_constraints() -> None:
    locked = {
        canonicalize_name(requirement.name): Version(str(requirement.specifier)[2:]).public
        for requirement, _ in entries(LOCKS[0])
    }
    stale = {name: (locked[name], constraints().get(name)) for name in locked if locked[name] != constraints().get(name)}
    assert not stale, "run `make lock`, and pin in constraints.txt what is new"


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_what_is_asked_for_is_locked_once_on_every_platform(platform: str, python: str) -> None:
    machine = {"linux": "x86_64", "darwin": "arm64", "win32": "AMD64"}[platform]
    system = {"linux": "Linux", "darwin": "Darwin", "win32": "Windows"}[platform]
    here = default_environment() | {
        "sys_platform": platform,
        "platform_system": system,
        "platform_machine": machine,
        "python_version": python,
        "python_full_version": f"{python}.1",
        "extra": "",
    }
    valid = [requirement for requirement, _ in entries(LOCKS[0]) if not requirement.marker or requirement.marker.evaluate(here)]
    locked = {canonicalize_name(requirement.name): str(requirement.specifier)[2:] for requirement in valid}
    assert len(locked) == len(valid)
    wanted = [Requirement(word) for word in PYPROJECT["project"]["dependencies"]] + asked_for("all") + asked_for("dev")
    assert len(wanted) > 20
    for requirement in wanted:
        if requirement.marker is None or requirement.marker.evaluate(here):
            assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), requirement
