"""Two hundred steps from one initialisation, on the same bytes: the ports give one curve."""

import pydoc_data.topics

import numpy as np
import pytest

import bdh_spec
from bdh_conformance.adversaries.mistakes import MISTAKES
from bdh_spec import AdamW, Backend, BDHConfig
from bdh_train import TrainConfig
from bdh_train.batches import batches
from bdh_train.data import Text
from bdh_train.schedule import rate

STEPS = 200
CONFIG = TrainConfig(data="topics", max_steps=STEPS, learning_rate=4e-3, warmup_steps=20, block_size=24, batch_size=4, seed=1)
MODEL = BDHConfig(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=8, dropout=0.0)
ENGLISH = Text((np.frombuffer("\n".join(sorted(pydoc_data.topics.topics.values())).encode(), np.uint8),))

# Of a loss, in nats. In float32 rounding flips a relu now and then, and a step of Adam makes more of it: by step 200 the curves
# are 0.00095 apart at most, in PyTorch, MLX and JAX. The smallest of the mistakes below takes them 0.023 apart.
ALLOWED = 5e-3
WRONG = ("adam_beta_default", "rate_late", "clip_missing", "adam_uncorrected", "theta_2_15")


def curve(backend: Backend, dtype: str) -> np.ndarray:
    """The losses of the first 200 steps."""
    params = bdh_spec.init(MODEL, np.random.default_rng(CONFIG.seed))
    model = backend.load(params, MODEL, device="cpu", dtype=dtype)
    optimizer = model.optimizer(AdamW(clip=0.5))
    steps = range(1, STEPS + 1)
    return np.array([model.train_on(optimizer, batches(CONFIG, ENGLISH, s), rate=rate(CONFIG, s)) for s in steps])


@pytest.fixture(scope="module")
def wanted() -> np.ndarray:
    return curve(bdh_spec.get_backend("numpy"), "float64")


def test_the_curve_falls(wanted: np.ndarray) -> None:
    assert wanted[:5].mean() > 5.3
    assert wanted[-20:].mean() < 3.6


def test_a_port_gives_the_curve_of_the_specification(port: str, wanted: np.ndarray) -> None:
    assert np.abs(curve(bdh_spec.get_backend(port), "float32") - wanted).max() <= ALLOWED


@pytest.mark.parametrize("mistake", WRONG)
def test_a_known_mistake_gives_another(mistake: str, wanted: np.ndarray) -> None:
    assert np.abs(curve(MISTAKES[mistake].backend(), "float32") - wanted).max() > 4 * ALLOWED
