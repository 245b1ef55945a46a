"""Train BDH in plain MLX: python examples/loops/mlx_loop.py [TEXT [STEPS]]"""

import pydoc_data.topics
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from bdh_mlx import BDH, BDHConfig

TEXT = Path(sys.argv[1]).read_bytes() if len(sys.argv) > 1 else "\n".join(pydoc_data.topics.topics.values()).encode()
STEPS, BATCH, WINDOW = int(sys.argv[2]) if len(sys.argv) > 2 else 300, 8, 128

mx.random.seed(0)
data, rng = np.frombuffer(TEXT, np.uint8), np.random.default_rng(0)
model = BDH(BDHConfig(n_layer=4, n_embd=64, n_head=4, mlp_internal_dim_multiplier=32)).train()
optimizer = optim.AdamW(learning_rate=4e-3, betas=[0.9, 0.95], weight_decay=0.1, bias_correction=True)
loss_and_slopes = nn.value_and_grad(model, lambda model, x, y: model(x, y)[1])

for step in range(1, STEPS + 1):
    starts = rng.integers(len(data) - WINDOW, size=BATCH)
    rows = mx.array(np.stack([data[s : s + WINDOW + 1] for s in starts]).astype(np.int32))
    loss, slopes = loss_and_slopes(model, rows[:, :-1], rows[:, 1:])
    slopes, _ = optim.clip_grad_norm(slopes, 1.0)
    optimizer.update(model, slopes)
    mx.eval(model.parameters(), optimizer.state)
    if step % 50 == 0 or step == STEPS:
        print(f"step {step}: loss {loss.item():.3f}")

model.save_weights("bdh.safetensors")  # bdh-generate "The " bdh.safetensors
prompt = mx.array([list(b"The ")])
print(bytes(model.eval().generate(prompt, 100, temperature=0.8, top_k=50, seed=7)[0].tolist()).decode(errors="replace"))
