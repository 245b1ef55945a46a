"""Training shared by several processes or devices is the training of one, within rounding."""

import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launching import launched

import bdh_spec
from bdh_conformance import Expectation, assert_agrees
from bdh_conformance.yardstick.tolerances import FLOAT64
from bdh_spec import AdamW, BDHConfig, BDHError, Spread
from bdh_spec.params import Array

sys.path.insert(0, str(Path(__file__).parent))
from steps_on_many import LONGEST, batches, config, params, trained

SCRIPT = Path(__file__).parent / "steps_on_many.py"
ALONE = Spread(1, 1)
TWO = [
    ("torch", Spread(data=2)),
    ("torch", Spread(neurons=2)),
    ("torch", Spread(data=2, shares_weights=True)),
    ("jax", Spread(data=2)),
    ("jax", Spread(neurons=2)),
    ("jax.distributed", Spread(data=2)),
    ("jax.distributed", Spread(neurons=2)),
    ("mlx", Spread(data=2)),
]
FOUR = [
    ("torch", Spread(data=4)),
    ("torch", Spread(neurons=4)),
    ("torch", Spread(data=2, neurons=2)),
    ("torch", Spread(data=2, neurons=2, shares_weights=True)),
    ("jax", Spread(data=2, neurons=2)),
    ("jax", Spread(data=2, neurons=2, shares_weights=True)),
    ("jax.distributed", Spread(data=2, neurons=2, shares_weights=True)),  # on two processes of two devices each
    ("mlx", Spread(data=4)),
]
ALL = [*TWO, *(pytest.param(*each, marks=pytest.mark.thorough) for each in FOUR)]
DROPOUT = 0.4
# Where it is said what is dropped: processes drop as one does that reads their texts as so many batches, devices of JAX as one.
DROPPED = {
    ("torch", Spread(data=2)): 2,
    ("torch", Spread(data=2, shares_weights=True)): 2,
    ("mlx", Spread(data=2)): 2,
    ("jax", Spread(data=2)): 1,
    ("jax.distributed", Spread(data=2)): 1,
}
STREAMED = "bdh_torch.backend:StreamedTorchBackend"
BEYOND = 1100  # tokens: more than any port reads without a state, or in one chunk
LONG = [
    (STREAMED, Spread(neurons=2)),
    pytest.param(STREAMED, Spread(data=2, shares_weights=True), marks=pytest.mark.thorough),
    pytest.param("torch", Spread(neurons=2), marks=pytest.mark.thorough),
    pytest.param("jax", Spread(data=2, neurons=2), marks=pytest.mark.thorough),
    pytest.param("mlx", Spread(data=2), marks=pytest.mark.thorough),
]


def run(port: str, spread: Spread, longest: int, *words: object) -> None:
    """Run the script of this test by the port's own launcher."""
    framework, many = framework_of(port), processes(port, spread)
    kinds, found = "shares" if spread.shares_weights else "-", "jax" if framework == "jax" else port
    program = [SCRIPT, found, "float64", spread.data, spread.neurons, kinds, longest, *words]
    launched(framework, many, *program, devices=spread.size // many)


def framework_of(port: str) -> str:
    return port.partition(".")[0].removeprefix("bdh_")


def processes(port: str, spread: Spread) -> int:
    """How many processes share a model: JAX has several devices in each."""
    return {"jax": 1, "jax.distributed": 2}.get(port, spread.size)


@cache
def alone(port: str, dropout: float, parts: int, longest: int) -> dict[str, Array]:
    """The same steps in this process."""
    model = bdh_spec.get_backend(port).load(params(), config(dropout), device="cpu", dtype="float64")
    return trained(model, parts, longest)


def assert_all_are(found: Path, port: str, many: int, dropout: float, wanted: dict[str, Array]) -> None:
    """Every process has what one process has that is alone."""
    allowed = {name: Expectation(value.ravel(), FLOAT64, FLOAT64) for name, value in wanted.items()}
    files = sorted(found.glob(f"{dropout}-*.npz"))
    assert len(files) == many
    for file in files:
        assert_agrees(port, {name: value.ravel() for name, value in np.load(file).items()}, allowed)


@pytest.mark.parametrize(("port", "spread"), ALL)
def test_three_steps_are_those_of_the_specification_and_r8_drop_as_one_does(port: str, spread: Spread, tmp_path: Path) -> None:
    parts, many = DROPPED.get((port, spread)), processes(port, spread)
    run(port, spread, LONGEST, tmp_path, 0.0, *([DROPOUT] if parts else []))
    assert_all_are(tmp_path, port, many, 0.0, alone("numpy", 0.0, 1, LONGEST))
    if parts:
        assert_all_are(tmp_path, port, many, DROPOUT, alone(framework_of(port), DROPOUT, parts, LONGEST))


@pytest.mark.parametrize(("port", "spread"), LONG)
def test_long_texts_are_read_by_all_as_by_one(port: str, spread: Spread, tmp_path: Path) -> None:
    """Beyond the lengths at which a port goes over to chunks and to the streamed kernel, which shares of neurons do without."""
    run(port, spread, BEYOND, tmp_path, 0.0)
    assert_all_are(tmp_path, port, processes(port, spread), 0.0, alone("numpy", 0.0, 1, BEYOND))


REFUSED: dict[str, tuple[str, Spread, dict[str, Any], str]] = {
    "a port that shares nothing": ("numpy", Spread(data=2), {}, "the numpy port does not share data: it shares nothing"),
    "neurons on a port that shares texts": (
        "mlx",
        Spread(neurons=2),
        {},
        "the mlx port does not share neurons: it shares data",
    ),
    "neurons that make no equal parts": ("torch", Spread(neurons=3), {}, "do not make 3 equal parts of whole pairs"),
    "neurons that make no pairs": ("jax", Spread(neurons=2), {"n_head": 32}, "do not make 2 equal parts of whole pairs"),
    "a width that does not divide": ("torch", Spread(data=3, shares_weights=True), {}, "weights 8 wide do not divide among 3"),
    "processes that are not there": ("torch", Spread(data=2), {}, "1 processes for a model that 2 share: torchrun"),
    "processes that MLX has not": ("mlx", Spread(data=2), {}, "1 processes for a model that 2 share: mlx.launch"),
    "devices that are not there": ("jax", Spread(data=2), {}, "cpu has 1 devices here for a model that 2 share; XLA_FLAGS"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_shared_is_refused_in_a_sentence(case: str) -> None:
    port, spread, sizes, sentence = REFUSED[case]
    configured = BDHConfig(**(config(0.0).as_dict() | sizes))
    weights = bdh_spec.init(configured, np.random.default_rng(0))
    with pytest.raises(BDHError, match=sentence):
        bdh_spec.get_backend(port).load(weights, configured, device="cpu", spread=spread)


@pytest.mark.parametrize(
    ("number", "sentence"), [("two", "invalid literal"), ("2", "before any JAX")], ids=["no number", "too late"]
)
def test_processes_of_jax_that_cannot_meet_are_one_sentence(
    number: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = bdh_spec.get_backend("jax")
    assert backend.devices()
    for name, value in (("COORDINATOR_ADDRESS", "127.0.0.1:1"), ("NUM_PROCESSES", number), ("PROCESS_ID", "0")):
        monkeypatch.setenv(f"JAX_{name}", value)
    with pytest.raises(BDHError, match=rf"could not meet the others of 127.0.0.1:1 \(.*{sentence}.*check JAX_NUM_PROCESSES"):
        backend.team()


def test_a_spread_of_one_is_the_model_itself() -> None:
    with pytest.raises(BDHError, match="data 0"):
        Spread(data=0)
    assert bdh_spec.get_backend("jax").team().is_first
    model = bdh_spec.get_backend("jax").load(params(), config(0.0), device="cpu", dtype="float64", spread=ALONE)
    for tokens, targets in batches(0):
        loss = model.train_step(model.optimizer(AdamW(learning_rate=0.0)), tokens, targets)
        assert loss == pytest.approx(model.loss(tokens, targets), rel=FLOAT64)
