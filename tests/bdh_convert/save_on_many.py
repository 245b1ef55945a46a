"""Train the torch port for a step on several processes, and save it in the ways that torch has: torchrun this FOLDER."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from bdh_spec import BDHConfig
from bdh_torch import BDH

CONFIG = BDHConfig(n_layer=2, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=11, dropout=0.0)
folder = Path(sys.argv[1])


def stepped(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    tokens = torch.arange(10).view(2, 5)
    model(tokens, tokens)[1].backward()
    optimizer.step()
    return optimizer


def fresh() -> BDH:
    torch.manual_seed(7)
    return BDH(CONFIG)


def save(name: str, content: object) -> None:
    if distributed.get_rank() == 0:
        torch.save(content, folder / name)


distributed.init_process_group("gloo")

plain = DistributedDataParallel(fresh())
optimizer = stepped(plain, torch.optim.AdamW(plain.parameters()))
save("ddp.pt", {"model": plain.state_dict(), "optimizer": optimizer.state_dict()})
save("whole-ddp.pt", plain.module.state_dict())

zero = DistributedDataParallel(fresh())
spread = ZeroRedundancyOptimizer(zero.parameters(), torch.optim.AdamW)
stepped(zero, spread)
spread.consolidate_state_dict(0)
save("zero.pt", {"model": zero.state_dict(), "optimizer": spread.state_dict() if distributed.get_rank() == 0 else None})
save("whole-zero.pt", zero.module.state_dict())

sharded = fresh()
fully_shard(sharded, mesh=init_device_mesh("cpu", (distributed.get_world_size(),)))
optimizer = stepped(sharded, torch.optim.AdamW(sharded.parameters(), foreach=False))
pieces, moments = get_state_dict(sharded, optimizer)
dcp.save({"model": pieces, "optim": moments, "rng": torch.get_rng_state()}, checkpoint_id=folder / "pieces")
dcp.save({"app": {"model": pieces, "optim": moments}}, checkpoint_id=folder / "pieces of a run")
torch.save(sharded.state_dict(), folder / f"rank{distributed.get_rank()}.pt")
full = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
for name in ("full.pt", "whole-full.pt", "whole-pieces.pt"):
    save(name, full)

distributed.barrier()  # a process that ends while the other still talks to it may abort
del plain, zero, sharded, optimizer, spread
gc.collect()  # nothing that was distributed outlives its group
distributed.destroy_process_group()
os._exit(0)  # all is written: PyTorch's own threads now and then abort a process that takes its time to end
