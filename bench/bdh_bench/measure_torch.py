"""bdh_torch beside the plain form in PyTorch, without a NumPy round trip.

bfloat16 is autocast over float32 weights for the plain form and for training, and weights in bfloat16 for the port's inference.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from bdh_bench import plain_torch as plain
from bdh_bench.sides import AGAIN, COMPILED, OURS, RATE, AbsentError, Framework, Named, Runner, Task, find_port
from bdh_spec.params import Array, Params
from bdh_spec.rope import frequencies
from bdh_torch import BDH, native
from bdh_torch.backend import NAMES, TorchModel

WIDE = 4  # bytes of a weight under autocast
COMPILERS = ("g++", "clang++", "c++", "cl")


class Torch(Framework):
    """PyTorch on one device."""

    name: ClassVar[str] = "torch"

    def facts(self) -> dict[str, str]:
        kind = torch.device(self.device).type
        chip = torch.cuda.get_device_name(self.device) if kind == "cuda" else torch.backends.cpu.get_cpu_capability()
        return {
            "framework": f"torch {torch.__version__}",
            "device": f"{self.device}, {chip}",
            "threads": str(torch.get_num_threads()),
            "between products": "one pass in C" if native.compiled(torch.float32) else "PyTorch's operations",
        }

    def runner(self, task: Task, params: Params) -> Runner:
        if task.row.kind == "transformers":
            from bdh_bench.measure_transformers import runner

            return runner(task, params)
        if task.side == OURS:
            return self.ours(task, params)
        if task.side == COMPILED:
            demand_compiler()
        return self.plain(task, params)

    def product(self, n: int, dtype: str) -> Callable[[], object]:
        a, b, out = (torch.ones(n, n, dtype=getattr(torch, dtype), device=self.device) for _ in range(3))
        return self.synchronised(lambda: torch.mm(a, b, out=out))

    def copy(self, size: int) -> Callable[[], object]:
        source, target = (torch.ones(size, dtype=torch.uint8, device=self.device) for _ in range(2))
        return self.synchronised(lambda: target.copy_(source))

    def held_itemsize(self, task: Task) -> int:
        return task.itemsize if task.side == OURS and task.row.kind != "train" else WIDE

    def available(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0] if self.on_cuda else super().available()

    def in_use(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.on_cuda else super().in_use()

    def forget_peak(self) -> None:
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            super().forget_peak()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.on_cuda else super().peak()

    @property
    def on_cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"

    def synchronised(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """``run``, which is over when the device is done."""
        if torch.device(self.device).type == "cpu":
            return run
        wait = torch.cuda.synchronize if self.on_cuda else torch.mps.synchronize

        def to_the_end() -> Any:
            result = run()
            wait()
            return result

        return to_the_end

    def autocast(self, dtype: str) -> AbstractContextManager[Any]:
        if dtype == "float32":
            return nullcontext()
        return torch.autocast(torch.device(self.device).type, getattr(torch, dtype))

    def ours(self, task: Task, params: Params) -> Runner:
        """The port's module."""
        training = task.row.kind == "train"
        dtype = "float32" if training else task.dtype
        loaded = find_port(task.port).load(params, task.config, device=task.device, dtype=dtype)
        assert isinstance(loaded, TorchModel)
        model: BDH = loaded.module
        tokens, targets, following = (self.ids(ids) for ids in (task.tokens(), task.targets(), task.next()))
        if training:
            weights = {name: model.get_parameter(path) for name, path in NAMES._asdict().items()}
            return self.trained(
                task, weights, lambda: model.train()(tokens, targets)[1], lambda: model.eval()(tokens, targets)[1]
            )
        if task.row.kind == "forward":
            return self.inferring(lambda: model(tokens)[0])
        if task.row.kind == "prefill":
            return self.inferring(lambda: model.advance(model.init_state(len(tokens)), tokens, donate=True)[0])
        with torch.no_grad():
            _, state = model.advance(model.init_state(len(tokens)), tokens, donate=True)
        state = replace(state, position=task.row.length)  # a state costs the same wherever it stands

        def step() -> None:
            nonlocal state
            _, state = model.advance(state, following, donate=True)

        return Runner(self.inferring(step).run, self.inferring(lambda: model.advance(state, following)[0]).answer)

    def plain(self, task: Task, params: Params) -> Runner:
        """The plain form, as it is or compiled."""
        config = task.config
        held = Params(*(nn.Parameter(torch.tensor(np.asarray(weight), device=self.device)) for weight in params))
        weights = plain.Weights(*held, torch.from_numpy(frequencies(config.n_neurons)).to(self.device))
        tokens, targets, following = (self.ids(ids) for ids in (task.tokens(), task.targets(), task.next()))

        def made(function: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compile(function, dynamic=False) if task.side == COMPILED else function

        if task.side == AGAIN:
            text = self.ids(task.text())
            return self.inferring(lambda: plain.forward(text, weights, config)[:, -1:], task.dtype)
        match task.row.kind:
            case "forward":
                forward = made(plain.forward)
                return self.inferring(lambda: forward(tokens, weights, config), task.dtype)
            case "prefill":
                prefill = made(plain.prefill)
                return self.inferring(lambda: prefill(tokens, weights, config)[0], task.dtype)
            case "train":
                loss = made(plain.loss)
                return self.trained(
                    task,
                    held._asdict(),
                    lambda: loss(tokens, targets, weights, config, config.dropout),
                    lambda: plain.loss(tokens, targets, weights, config),
                )
            case _:
                step, (_, memories) = made(plain.step), torch.no_grad()(plain.prefill)(tokens, weights, config)
                return self.inferring(lambda: step(following, memories, task.row.length, weights, config)[0], task.dtype)

    def inferring(self, run: Callable[[], Any], dtype: str = "float32") -> Runner:
        """A run without gradients, under autocast if its weights are wider than ``dtype``."""

        @torch.no_grad()
        def once() -> Any:
            with self.autocast(dtype):
                return run()

        whole = self.synchronised(once)
        return Runner(whole, lambda: {"logits": numpy(whole())})

    def trained(
        self, task: Task, weights: dict[str, nn.Parameter], loss: Callable[[], Tensor], undropped: Callable[[], Tensor]
    ) -> Runner:
        """Steps of AdamW, and the slopes without dropout."""
        held = list(weights.values())
        adam = torch.optim.AdamW(held, lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)

        def step() -> None:
            adam.zero_grad()
            with self.autocast(task.dtype):
                value = loss()
            value.backward()  # type: ignore[no-untyped-call]  # PyTorch has not typed it
            nn.utils.clip_grad_norm_(held, 1.0)
            adam.step()

        def slopes() -> Named:
            with self.autocast(task.dtype):
                value = undropped()
            return dict(zip(weights, map(numpy, torch.autograd.grad(value, held)), strict=True))

        return Runner(self.synchronised(step), slopes)

    def ids(self, ids: Array) -> Tensor:
        return torch.tensor(ids, device=self.device)


def demand_compiler() -> None:
    """torch.compile builds C++ at run time, for a GPU's launchers as well."""
    named = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ([named] if named else COMPILERS)):
        raise AbsentError(f"torch.compile needs a C++ compiler, and {named or ', '.join(COMPILERS)} is not here")


def numpy(value: Tensor) -> Array:
    """A copy in NumPy."""
    return value.detach().float().cpu().numpy()


MEASURED = Torch
