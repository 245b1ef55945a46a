"""Which port: the one asked for, the one the environment names, or the one that suits the machine."""

import importlib
import importlib.metadata
import subprocess
import sys
from types import SimpleNamespace

import pytest

import bdh_spec
from bdh_spec import BackendUnavailable, registry


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """A machine with the frameworks and devices that a test gives it."""

    def build(*, system: str = "Linux", chip: str = "x86_64", **devices: tuple[str, ...]) -> None:
        monkeypatch.delenv("BDH_BACKEND", raising=False)
        monkeypatch.setattr(registry.platform, "system", lambda: system)
        monkeypatch.setattr(registry.platform, "machine", lambda: chip)
        monkeypatch.setattr(registry, "_installed", lambda module: module.split(".")[0] in devices)
        monkeypatch.setattr(registry, "_jax_may_accelerate", lambda: True)
        monkeypatch.setattr(
            registry, "get_backend", lambda name: SimpleNamespace(name=name, devices=lambda: devices.get(name, ("cpu",)))
        )

    return build


@pytest.mark.parametrize(
    ("facts", "best"),
    [
        ({"system": "Darwin", "chip": "arm64", "mlx": ("gpu",), "torch": ("mps", "cpu")}, "mlx"),
        ({"system": "Darwin", "chip": "x86_64", "torch": ("cpu",)}, "torch"),
        ({"mlx": ("cpu",), "torch": ("cuda", "cpu"), "jax": ("gpu", "cpu")}, "torch"),
        ({"torch": ("cpu",), "jax": ("tpu", "cpu")}, "jax"),
        ({"mlx": ("cpu",), "torch": ("cpu",), "jax": ("cpu",)}, "torch"),
        ({"mlx": ("cpu",), "jax": ("cpu",)}, "jax"),
        ({"mlx": ("cpu",)}, "numpy"),
        ({}, "numpy"),
    ],
    ids=str,
)
def test_auto_takes_the_port_that_suits_the_machine(machine, facts: dict, best: str) -> None:
    machine(**facts)
    assert registry.choose("auto").name == best


def test_the_environment_overrides_auto_and_nothing_else(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(torch=("cuda",))
    monkeypatch.setenv("BDH_BACKEND", "jax")
    assert registry.choose("auto").name == "jax"
    assert registry.choose("numpy").name == "numpy"


def test_a_name_that_no_port_bears_is_refused() -> None:
    with pytest.raises(BackendUnavailable, match="no port is named 'tinygrad': there are numpy, jax, mlx, torch"):
        bdh_spec.get_backend("tinygrad")


@pytest.fixture(scope="module")
def bare() -> dict[str, str]:
    """What the registry says of each port in a Python that finds no framework: one process, which imports none of them."""
    code = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "jax", "mlx"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
import bdh_spec
for port in bdh_spec.backends():
    print(port.name, port, sep="\\t")
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return dict(line.split("\t") for line in finished.stdout.splitlines())


@pytest.mark.parametrize("name", ["torch", "jax", "mlx"])
def test_an_absent_framework_is_named_with_its_install_command(bare: dict[str, str], name: str) -> None:
    assert "available=True" in bare["numpy"]
    assert "available=False" in bare[name]
    assert f"{name} is not installed: pip install 'bdh-spec[{name}]'" in bare[name]


def test_a_broken_framework_raises_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: object) -> None:
        raise OSError("libfoo.so: cannot open shared object file")

    monkeypatch.setattr(importlib.metadata.EntryPoint, "load", broken)
    with pytest.raises(OSError, match="libfoo"):
        bdh_spec.get_backend("torch")
    assert "libfoo" in next(p.reason for p in bdh_spec.backends() if p.name == "torch")


def test_importing_the_specification_imports_no_framework() -> None:
    code = "import sys, bdh_spec; print(sorted({'torch', 'jax', 'mlx', 'click', 'rich'} & set(sys.modules)))"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"


def test_the_report_names_devices_and_dtypes() -> None:
    reports = {report.name: report for report in bdh_spec.backends()}
    assert list(reports) == ["numpy", "jax", "mlx", "torch"]
    assert all(report.available and "cpu" in report.devices and "float32" in report.dtypes for report in reports.values())


def test_a_path_may_be_a_string_and_the_default_is_the_embedded_checkpoint() -> None:
    ours, config = bdh_spec.read()
    same, _ = bdh_spec.read(str(registry.checkpoint.EMBEDDED))
    assert bdh_spec.fingerprint(ours) == bdh_spec.fingerprint(same)
    assert config.vocab_size == 256


@pytest.mark.parametrize("word", ["fp64", "F64", "double", "float64"])
def test_every_name_of_a_dtype_means_one_thing(word: str) -> None:
    assert bdh_spec.load(backend="numpy", dtype=word).dtype == "float64"
