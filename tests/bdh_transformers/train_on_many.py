"""Train a small model for a few steps, on one process or as one of two, and keep its weights: a test runs it both ways.

torchrun --nproc_per_node 2 train_on_many.py FOLDER
"""

import gc
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainingArguments

from bdh_transformers import BDHConfig, BDHForCausalLM

TEXTS, LENGTH, BATCH, RATE = 16, 12, 4, 0.5
SIZES = {
    "vocab_size": 29,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "mlp_internal_dim_multiplier": 8,
}


def main(folder: str) -> None:
    by_trainer(folder, 2)
    by_hand(folder, 2)
    dist.barrier()  # a process that ends while the other still talks to it may abort
    gc.collect()  # nothing that was distributed outlives its group
    dist.destroy_process_group()
    os._exit(0)  # all is written: PyTorch's own threads now and then abort a process that takes its time to end


def model() -> BDHForCausalLM:
    """The same at each call, with weights large enough to learn at once."""
    torch.manual_seed(0)
    made = BDHForCausalLM(BDHConfig(**SIZES, dropout=0))
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(10)
    return made


def texts() -> list[dict[str, torch.Tensor]]:
    """Random texts, of whose labels different numbers count."""
    numbers = torch.Generator().manual_seed(1)
    ids = torch.randint(SIZES["vocab_size"], (TEXTS, LENGTH), generator=numbers)
    return [{"input_ids": row, "labels": row.masked_fill(torch.arange(LENGTH) > 3 + i % 9, -100)} for i, row in enumerate(ids)]


def by_trainer(folder: str, processes: int) -> None:
    """With transformers' Trainer, which shares a batch out by DistributedDataParallel."""
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=BATCH // processes,
        num_train_epochs=1,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model(), arguments, train_dataset=texts())
    trainer.train()
    keep(trainer.model.state_dict(), folder, "trainer")


def by_hand(folder: str, processes: int) -> None:
    """In plain PyTorch; two processes keep half of each weight (FSDP2)."""
    trained, rank, data = model(), 0, texts()
    if processes > 1:
        rank, mesh = dist.get_rank(), init_device_mesh("cpu", (processes,))
        for module in (trained.backbone, trained):
            fully_shard(module, mesh=mesh)
    optimizer = torch.optim.SGD(trained.parameters(), lr=RATE)
    for start in range(0, TEXTS, BATCH):
        rows = data[start : start + BATCH]
        counted = sum((row["labels"][1:] != -100).sum() for row in rows) / processes  # FSDP takes the mean over processes
        mine = {name: torch.stack([row[name] for row in rows[rank::processes]]) for name in rows[0]}
        optimizer.zero_grad()
        trained(**mine, num_items_in_batch=counted).loss.backward()
        optimizer.step()
    keep(
        {name: weight.full_tensor() if processes > 1 else weight for name, weight in trained.state_dict().items()},
        folder,
        "hand",
    )


def keep(weights: dict[str, torch.Tensor], folder: str, name: str) -> None:
    """Write the weights, once."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        save_file({name: weight.contiguous() for name, weight in weights.items()}, Path(folder) / f"{name}.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
