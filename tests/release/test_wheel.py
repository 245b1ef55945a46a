"""The wheel and the source distribution: the same bytes every time, with all that is needed, and a wheel that stands alone."""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
# Built by hatchling or by us, and in no commit.
LEFT_OUT = (".venv", ".git", "dist", "demo-output")


def build(what: str, folder: Path, **environment: str) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", what, "-d", str(folder)]
    told = os.environ | {"SOURCE_DATE_EPOCH": "1700000000"} | environment
    subprocess.run(command, cwd=ROOT, env=told, check=True, capture_output=True)
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", tmp_path_factory.mktemp("sdist"))


def test_two_builds_are_the_same_bytes(wheel: Path, source: Path, tmp_path: Path) -> None:
    again = build("wheel", tmp_path / "wheel", PYTHONHASHSEED="1", TZ="Pacific/Auckland")
    assert again.read_bytes() == wheel.read_bytes()
    again = build("sdist", tmp_path / "sdist", PYTHONHASHSEED="1", TZ="Pacific/Auckland")
    assert again.read_bytes() == source.read_bytes()


def packaged() -> Iterator[str]:
    """Every file of every package, as it lies in the wheel."""
    for parent in (
        "",
        "backends/torch",
        "backends/mlx",
        "backends/jax",
        "conformance",
        "convert",
        "generate",
        "train",
        "bench",
        "look",
    ):
        for package in (ROOT / parent).glob("bdh_*"):
            files = (path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
            yield from (str(path.relative_to(ROOT / parent)) for path in files)


def test_the_wheel_holds_every_file_of_every_package_and_the_pages_for_authors_of_ports(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {*packaged(), "bdh_conformance/PORTING.md", "bdh_conformance/VECTORS.md"}
    assert len(wanted) > 150
    assert not wanted - held
    assert not {name for name in held - wanted if ".dist-info/" not in name}


def test_the_source_distribution_holds_what_is_tracked(source: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout, so nothing tells what is tracked")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    with tarfile.open(source) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert not {name for name in tracked if (ROOT / name).exists()} - held


def closure(*names: str) -> set[str]:
    """The distributions that some need, themselves included, by the metadata of what is installed here."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name.lower() in found:
            continue
        found.add(name.lower())
        needed = map(Requirement, distribution(name).requires or ())
        waiting += [one.name for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def alone(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and what it and the suite need, and no framework; nothing is downloaded."""
    folder = tmp_path_factory.mktemp("alone")
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in closure("numpy", "safetensors", "ml_dtypes", "click", "rich", "hypothesis", "pytest", "jinja2"):
        held = distribution(name)
        tops = {path.parts[0] for path in held.files or () if path.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(held.locate_file(top))))
    command = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet", "--no-deps"]
    subprocess.run([*command, "--no-index", "--disable-pip-version-check", str(wheel)], check=True, capture_output=True)
    return folder / "bin"


COMMANDS = [
    "bdh-generate 'The ' --seed 7 -n 20 > text",
    "bdh-generate --backends > ports && grep -q 'torch.*no: torch is not installed' ports",
    "python -c 'import bdh_spec; bdh_spec.save(\"m.safetensors\", *bdh_spec.read())'",
    "bdh-convert numpy-to-mlx m.safetensors -o m.npz",
    "bdh-convert mlx-to-torch m.npz -o m.pt",
    "bdh-convert torch-to-hf m.pt -o m.hf",
    "bdh-convert --inspect m.hf",
    "bdh-generate 'The ' m.hf --seed 7 -n 20 | cmp - text",
    "bdh-look 'The dragon' -o page.html && grep -q 'Expected next' page.html",
    "bdh-look live -o live.html && grep -q 'The graph behind it' live.html",
    "bdh-conform numpy --tier smoke -q",
    "bdh-conform vectors export vectors && test -f vectors/first_steps/case.txt",
    "! python -c 'import torch'",
]


@pytest.mark.skipif(sys.platform == "win32", reason="the commands are written for a shell of POSIX")
def test_the_wheel_alone_does_what_needs_no_framework(alone: Path, tmp_path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "BDH_"))}
    environment = kept | {"PATH": f"{alone}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    for line in COMMANDS:
        done = subprocess.run(line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    where = [alone / "python", "-c", "import bdh_spec; print(bdh_spec.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert Path(found).is_relative_to(alone.parent)
