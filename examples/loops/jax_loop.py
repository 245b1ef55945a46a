"""Train BDH in plain JAX with Optax: python examples/loops/jax_loop.py [TEXT [STEPS]]"""

import pydoc_data.topics
import sys
from pathlib import Path

import jax
import numpy as np
import optax

import bdh_jax
import bdh_spec

TEXT = Path(sys.argv[1]).read_bytes() if len(sys.argv) > 1 else "\n".join(pydoc_data.topics.topics.values()).encode()
STEPS, BATCH, WINDOW = int(sys.argv[2]) if len(sys.argv) > 2 else 300, 8, 128

config = bdh_jax.BDHConfig(n_layer=4, n_embd=64, n_head=4, mlp_internal_dim_multiplier=32)
data, rng = np.frombuffer(TEXT, np.uint8), np.random.default_rng(0)
params = bdh_jax.init(config, jax.random.key(0))
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(4e-3, 0.9, 0.95, weight_decay=0.1))


@jax.jit
def update(tokens, targets, params, state, key):
    loss, slopes = bdh_jax.gradients(tokens, targets, params, config, key=key)
    moves, state = optimizer.update(slopes, state, params)
    return loss, optax.apply_updates(params, moves), state


state = optimizer.init(params)
for step in range(1, STEPS + 1):
    starts = rng.integers(len(data) - WINDOW, size=BATCH)
    rows = np.stack([data[s : s + WINDOW + 1] for s in starts]).astype(np.int32)
    loss, params, state = update(rows[:, :-1], rows[:, 1:], params, state, jax.random.key(step))
    if step % 50 == 0 or step == STEPS:
        print(f"step {step}: loss {loss:.3f}")

bdh_spec.save("bdh.safetensors", jax.tree.map(np.asarray, params), config)  # bdh-generate "The " bdh.safetensors
text = bdh_jax.generate([list(b"The ")], params, config, 100, 0.8, 50, seed=7)
print(bytes(text[0].tolist()).decode(errors="replace"))
