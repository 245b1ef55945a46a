"""Three steps of a loop of one's own with a BDH in a wrapper of PyTorch's: torchrun wrapped_on_many.py WRAPPER FILE"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from bdh_torch import BDH, BDHConfig

CONFIG = BDHConfig(n_layer=2, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=11, dropout=0.0)


def stepped(wrapper: str, rank: int, size: int) -> dict[str, Tensor]:
    """The weights after three steps on four texts, of which each process reads its own."""
    torch.manual_seed(7)
    module, generator = BDH(CONFIG).double(), torch.Generator().manual_seed(1)
    model: nn.Module = DistributedDataParallel(module) if wrapper == "ddp" else module
    if wrapper == "fsdp":
        fully_shard(module, mesh=init_device_mesh("cpu", (size,)))
    optimizer = torch.optim.SGD(model.parameters(), 1.0, foreach=False)
    for _ in range(3):
        ids = torch.randint(11, (4, 10), generator=generator).chunk(size)[rank]
        _, loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: weight.detach() for name, weight in module.named_parameters()}
    return {name: w.full_tensor() if isinstance(w, DTensor) else w for name, w in weights.items()}


def main(wrapper: str, file: Path) -> None:
    distributed.init_process_group("gloo")
    weights = stepped(wrapper, distributed.get_rank(), distributed.get_world_size())
    if distributed.get_rank() == 0:
        torch.save(weights, file)
    distributed.barrier()  # a process that ends while the other still talks to it may abort
    gc.collect()  # nothing that was distributed outlives its group
    distributed.destroy_process_group()
    os._exit(0)  # all is written: PyTorch's own threads now and then abort a process that takes its time to end


if __name__ == "__main__" and "RANK" in os.environ:
    main(sys.argv[1], Path(sys.argv[2]))
