"""The parts of D3 that the page draws with: what the lock file names, with their licence, and nothing that is not used."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from bdh_look.live import JAVASCRIPT, bundle

VENDOR = Path(__file__).parents[2] / "look" / "vendor"
BUNDLED = (JAVASCRIPT / "d3.mjs").read_text(encoding="utf-8")


def test_the_bundle_names_the_versions_of_the_lock_file_and_their_licence() -> None:
    locked = json.loads((VENDOR / "package-lock.json").read_text())["packages"]
    named = dict(re.findall(r"(?m)^ \* (d3-[a-z]+) ([\d.]+), Copyright", BUNDLED))
    assert len(named) > 10
    for name, version in named.items():
        assert locked[f"node_modules/{name}"]["version"] == version
        assert locked[f"node_modules/{name}"]["license"] == "ISC"
    assert "Permission to use, copy, modify" in BUNDLED
    assert not any("resolved" in one for one in locked.values()), "a lock file names no registry"


def test_the_page_carries_the_licence_and_uses_all_that_is_bundled() -> None:
    page = bundle("page")
    assert "Permission to use, copy, modify" in page
    wanted = {
        name for line in re.findall(r"(?m)^export \{([^}]*)\}", (VENDOR / "d3.mjs").read_text()) for name in line.split(", ")
    }
    wanted = {name.strip() for name in wanted}
    sources = [path.read_text() for path in JAVASCRIPT.glob("*.mjs") if path.name != "d3.mjs"]
    imported = {
        name.strip()
        for source in sources
        for names in re.findall(r'import \{([^}]*)\} from "\./d3\.mjs"', source)
        for name in names.split(",")
        if name.strip()
    }
    assert imported == wanted


@pytest.mark.skipif(not (VENDOR / "node_modules").is_dir(), reason="make javascript has fetched nothing here; CI runs it")
def test_the_bundle_is_what_the_build_makes(tmp_path: Path) -> None:
    shutil.copytree(VENDOR, tmp_path / "look" / "vendor", symlinks=True)
    (tmp_path / "look" / "bdh_look" / "javascript").mkdir(parents=True)
    subprocess.run(["npm", "run", "--silent", "build"], cwd=tmp_path / "look" / "vendor", check=True)
    assert (tmp_path / "look" / "bdh_look" / "javascript" / "d3.mjs").read_text(encoding="utf-8") == BUNDLED
