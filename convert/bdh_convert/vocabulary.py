"""Words by which a name is known to be about training alone, so that the function does not depend on what bears it."""

from __future__ import annotations

import re

# One of these has to be there,
ABOUT_TRAINING = frozenset(
    """
    adam adamw amp averaged backend batch beta1 beta2 betas callbacks checkpoint checkpointing checkpoints ckpt compile
    compiled criterion cuda data dataloader dataset datasets ddp deepspeed device devices dir directory dtype early epoch
    epochs eval evaluation experiment fsdp git grad gradient gradients hostname iter iteration iterations iters lightning
    log logdir logger logging loops loss losses lr lrs metric metrics mlflow momentum muon opt optim optimiser optimizer
    optimizers path patience precision profile project resume rng run save scheduler schedulers seed seeds sgd step steps
    tensorboard test timestamp train trainer training val valid validation version wandb warmup workers
    """.split()  # noqa: SIM905  one word a line would fill a page
)
# and these may be with it.
BESIDE_THAT = frozenset(
    """
    acc accumulation always args avg base best client clip commit config count cpu current default dict end every final fn
    for fraction from global gpu hash id initial interval last learning len length local max mean min mode ms n name names
    num number numpy of only out output p param params per pipeline python rate ratio reports schedule second seconds sha
    shuffle size speed start state states sum tags tensor time tokens torch total type use value weight weights
    """.split()  # noqa: SIM905
)
# What is about training as a whole only.
PAIRS = (
    "activation_checkpointing",
    "clip_norm",
    "context_parallel",
    "data_parallel",
    "ema_decay",
    "ema_rate",
    "generator_state",
    "grad_norm",
    "grad_scaler",
    "init_from",
    "learning_rate",
    "local_rank",
    "lr_decay",
    "decay_lr",
    "max_norm",
    "model_parallel",
    "num_processes",
    "pin_memory",
    "pipeline_parallel",
    "random_state",
    "sequence_parallel",
    "tensor_parallel",
    "weight_decay",
    "world_size",
)


OPTIMIZERS = frozenset("optimizer optimizers optimiser optim opt adam adamw sgd muon grad grads gradients".split())  # noqa: SIM905


# What tensors of the training are called; words such as val or project may be parts of a model.
OF_TENSORS = OPTIMIZERS | frozenset(
    """
    averaged criterion epoch epochs iteration iterations loss losses lr metric metrics rng scheduler schedulers seed step steps
    """.split()  # noqa: SIM905
)


def is_a_tensor_of_training(name: str) -> bool:
    """Whether the first part of a tensor's name says that it belongs to the training, and nothing else.

    >>> [is_a_tensor_of_training(name) for name in ("criterion.weight", "opt_state.0.mu", "val.weight", "step_embedding")]
    [True, True, False, False]
    """
    first = name.split(".")[0]
    return bool(OF_TENSORS & set(re.split(r"[\W_]+", first.lower()))) and is_about_training(first)


def is_an_optimizers(name: str) -> bool:
    """Whether a name says that what is below it belongs to an optimizer, which keeps copies under the names of weights."""
    return bool(OPTIMIZERS & set(re.split(r"[\W_]+", name.lower())))


def is_about_training(name: str) -> bool:
    """Whether every word of a name is known, and one of them is about training.

    >>> [is_about_training(name) for name in ("lr_decay_iters", "step_embedding", "layer_norm_eps")]
    [True, False, False]
    """
    plain = name.lower().replace("-", "_")
    for pair in PAIRS:
        plain = plain.replace(pair, "training")
    words = {word for word in re.split(r"[\W_]+", plain) if word and not word.isdigit()}
    return bool(words & ABOUT_TRAINING) and words <= ABOUT_TRAINING | BESIDE_THAT
