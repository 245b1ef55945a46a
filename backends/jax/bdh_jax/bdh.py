"""The model as an object, for those who want one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax

from bdh_jax import generation, model
from bdh_jax.rope import Array
from bdh_spec.checks import check_targets, check_tokens
from bdh_spec.config import BDHConfig
from bdh_spec.params import Array as NumpyArray
from bdh_spec.params import Params
from bdh_spec.rope import Phase

forward = jax.jit(model.forward, static_argnames=("config", "phase", "kernel"))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BDH:
    """A configuration with its weights: a pytree whose leaves are the weights, so ``jax.grad`` and Optax take it whole.

    >>> model = BDH.init(BDHConfig(n_layer=2, n_embd=8, n_head=2, mlp_internal_dim_multiplier=2))
    >>> logits, loss = model([[1, 2, 3]], [[2, 3, 4]])
    >>> logits.shape
    (1, 3, 256)
    >>> model.generate([[1, 2, 3]], 4, temperature=0.8, top_k=50, seed=7).shape
    (1, 7)
    """

    config: BDHConfig = field(metadata={"static": True})
    params: Params
    phase: Phase = field(default="exact", metadata={"static": True})

    @classmethod
    def init(cls, config: BDHConfig, key: Array | None = None) -> BDH:
        """A model with fresh float32 weights, those of key 0 unless another is given."""
        return cls(config, model.init(config, jax.random.key(0) if key is None else key))

    def __call__(self, idx: Any, targets: Any = None) -> tuple[Array, Array | None]:
        """Logits (B, T, V) of tokens (B, T), and their loss if targets are given. Without dropout."""
        idx = idx if _is_traced(idx) else check_tokens(idx, self.config)
        logits = forward(idx, self.params, self.config, phase=self.phase)
        if targets is None:
            return logits, None
        targets = targets if _is_traced(idx, targets) else check_targets(targets, idx, self.config)
        return logits, model.loss(logits, targets)

    def generate(
        self, idx: Any, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None, *, seed: int | None = None
    ) -> NumpyArray:
        """Tokens (B, T) and their continuation, (B, T + max_new_tokens)."""
        return generation.generate(
            idx, self.params, self.config, max_new_tokens, temperature, top_k, seed=seed, phase=self.phase
        )


def _is_traced(*arrays: Any) -> bool:
    """Whether these have no values yet that could be checked: inside jit, grad or vmap."""
    return any(isinstance(array, jax.core.Tracer) for array in arrays)
