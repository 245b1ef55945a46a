"""Train BDH in plain PyTorch: python examples/loops/torch_loop.py [TEXT [STEPS]]"""

import pydoc_data.topics
import sys
from pathlib import Path

import torch

from bdh_torch import BDH, BDHConfig

TEXT = Path(sys.argv[1]).read_bytes() if len(sys.argv) > 1 else "\n".join(pydoc_data.topics.topics.values()).encode()
STEPS, BATCH, WINDOW = int(sys.argv[2]) if len(sys.argv) > 2 else 300, 8, 128

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
data = torch.frombuffer(bytearray(TEXT), dtype=torch.uint8)
model = BDH(BDHConfig(n_layer=4, n_embd=64, n_head=4, mlp_internal_dim_multiplier=32)).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1)

for step in range(1, STEPS + 1):
    starts = torch.randint(len(data) - WINDOW, (BATCH,))
    rows = torch.stack([data[s : s + WINDOW + 1] for s in starts.tolist()]).long().to(device)
    _, loss = model(rows[:, :-1], rows[:, 1:])
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if step % 50 == 0 or step == STEPS:
        print(f"step {step}: loss {loss.item():.3f}")

torch.save({"model": model.state_dict(), "config": model.config.as_dict()}, "bdh.pt")  # bdh-generate "The " bdh.pt
prompt = torch.tensor([list(b"The ")], device=device)
print(bytes(model.generate(prompt, 100, temperature=0.8, top_k=50, seed=7)[0].tolist()).decode(errors="replace"))
