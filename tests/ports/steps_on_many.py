"""Three steps of training, alone or on several processes or devices: what each process has in the end, as files in a folder.

python steps_on_many.py PORT DTYPE DATA NEURONS SHARES_WEIGHTS LONGEST FOLDER DROPOUT..., by the port's own launcher
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import bdh_spec
from bdh_conformance.ports import find_port
from bdh_spec import AdamW, BDHConfig, Model, Params, Spread
from bdh_spec.model import IGNORE
from bdh_spec.params import Array

SIZES = {"n_layer": 2, "n_embd": 8, "n_head": 2, "mlp_internal_dim_multiplier": 8, "vocab_size": 11}
SETTINGS = AdamW(learning_rate=1e-2, weight_decay=0.1, clip=0.05, seed=3, frozen=("lm_head",))  # so small that it always clips
STEPS = 3
LONGEST = 9  # tokens of the texts in one of the two batches of a step, unless told otherwise; the other's are a third shorter


def config(dropout: float) -> BDHConfig:
    return BDHConfig(**SIZES, dropout=dropout)


def params() -> Params:
    """Weights of a size at which every rule matters."""
    return Params(*(20 * weight for weight in bdh_spec.init(config(0.0), np.random.default_rng(1))))


def batches(step: int, longest: int = LONGEST) -> list[tuple[Array, Array]]:
    """Two batches of four texts, of which some have more targets that count than others."""
    rng, found = np.random.default_rng(step), []
    for T in (longest * 2 // 3, longest):
        ids = rng.integers(SIZES["vocab_size"], size=(4, T + 1))
        targets = ids[:, 1:].copy()
        targets[0, : T - 2] = IGNORE
        found.append((ids[:, :-1], targets))
    return found


def trained(model: Model, parts: int = 1, longest: int = LONGEST) -> dict[str, Array]:
    """What three steps make of a model; each batch may be read in parts, as if they were batches of their own."""
    optimizer, losses = model.optimizer(SETTINGS), []
    for step in range(STEPS):
        whole = batches(step, longest)
        pieces = [tuple(np.split(ids, parts)[part] for ids in pair) for pair in whole for part in range(parts)]
        losses.append(model.train_on(optimizer, pieces))
        optimizer = model.import_optimizer(model.export_optimizer(optimizer))  # which must change nothing
    tokens, targets = batches(0, longest)[0]
    logits, state = model.advance(model.init_state(4), tokens[:, :3])
    one, state = model.advance(state, tokens[:, 3:4], donate=True)
    more, _ = model.advance(state, tokens[:, 4:], donate=True)
    state_of = model.export_optimizer(optimizer)
    return {
        "losses": np.array(losses),
        "loss": np.array(model.loss(tokens, targets)),
        "forward": model.forward(tokens),
        "advanced": np.concatenate([logits, one, more], axis=1),
        **{f"weights.{name}": value for name, value in model.params()._asdict().items()},
        **{f"first.{name}": value for name, value in state_of.first._asdict().items()},
        **{f"second.{name}": value for name, value in state_of.second._asdict().items()},
        **{f"masters.{name}": value for name, value in (state_of.masters._asdict().items() if state_of.masters else ())},
    }


def main(port: str, dtype: str, data: str, neurons: str, shares: str, longest: str, folder: str, *dropouts: str) -> None:
    backend = find_port(port)
    team = backend.team()
    spread = Spread(int(data), int(neurons), shares == "shares")
    for dropout in dropouts:
        model = backend.load(params(), config(float(dropout)), device="cpu", dtype=dtype, spread=spread)
        np.savez(Path(folder) / f"{dropout}-{team.rank}.npz", **trained(model, longest=int(longest)))
    team.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
