"""Baby Dragon Hatchling in JAX: pure functions over a pytree of five weights, and a thin object around them.

>>> import jax
>>> from bdh_jax import BDHConfig, forward, init
>>> config = BDHConfig(n_layer=2, n_embd=8, n_head=2, mlp_internal_dim_multiplier=2)
>>> params = init(config, jax.random.key(0))
>>> jax.jit(forward, static_argnames="config")(jax.numpy.array([[1, 2, 3]]), params, config).shape
(1, 3, 256)
"""

from bdh_jax.bdh import BDH
from bdh_jax.files import load
from bdh_jax.generation import continue_text, generate, prefill
from bdh_jax.model import RecurrentState, advance, forward, init, init_state, loss, trace
from bdh_jax.training import gradients, objective
from bdh_spec.config import BDHConfig
from bdh_spec.params import Params

__all__ = [
    "BDH",
    "BDHConfig",
    "Params",
    "RecurrentState",
    "advance",
    "continue_text",
    "forward",
    "generate",
    "gradients",
    "init",
    "init_state",
    "load",
    "loss",
    "objective",
    "prefill",
    "trace",
]
