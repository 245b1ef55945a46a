"""Pages that are read far from this repository."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOME = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Homepage"]
PACKAGED = ["README.md", "conformance/PORTING.md", "conformance/VECTORS.md"]


def links(page: str) -> list[str]:
    found = re.findall(r"\]\(\s*([^)\s]+)\s*\)", (ROOT / page).read_text())
    return found + re.findall(r"(?m)^\[[^]]+\]:\s*(\S+)", (ROOT / page).read_text())


@pytest.mark.parametrize("page", PACKAGED)
def test_links_lead_somewhere_from_wherever_the_page_is_read(page: str) -> None:
    beside = {"PORTING.md", "VECTORS.md"} if page != "README.md" else set()
    for link in links(page):
        address, _, _ = link.partition("#")
        assert link.startswith(("https://", "#")) or address in beside, f"{page}: {link} leads nowhere outside the repository"


@pytest.mark.parametrize("page", [*PACKAGED, "SECURITY.md", "CHANGELOG.md", "pyproject.toml"])
def test_what_is_linked_in_the_repository_is_there(page: str) -> None:
    for kind, path in re.findall(rf"{re.escape(HOME)}/(blob|tree)/main/([^)\s\"#>]+)", (ROOT / page).read_text()):
        assert (ROOT / path).is_file() if kind == "blob" else (ROOT / path).is_dir(), f"{page} links to {path}"


def test_the_readme_has_links_to_look_at() -> None:
    assert sum(link.startswith(HOME) for link in links("README.md")) >= 5
