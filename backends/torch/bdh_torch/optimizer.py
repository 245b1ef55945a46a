"""R16 by ``torch.optim.AdamW``: over the weights themselves, or over float32 masters of narrower ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bdh_spec import AdamW
from bdh_spec.optimizer import dropout_seed, moving
from bdh_spec.params import Params
from bdh_torch.layer import wide


class Optimizer:
    """AdamW over the five weights of a module."""

    def __init__(self, weights: Sequence[nn.Parameter], settings: AdamW) -> None:
        s, self.weights = settings, list(weights)
        self.settings, self.steps = settings, 0
        self.is_narrow = weights[0].dtype != wide(weights[0].dtype)
        self.masters = [nn.Parameter(w.detach().to(wide(w.dtype))) for w in weights] if self.is_narrow else self.weights
        moved = moving(Params(*self.masters), settings) or [nn.Parameter(torch.zeros(1))]  # PyTorch wants one to move
        self.adam = torch.optim.AdamW(moved, betas=s.betas, eps=s.eps, weight_decay=s.weight_decay)

    def next_seed(self, part: int) -> int:
        """What decides the dropout of a batch of the next step."""
        return dropout_seed(self.settings.seed, self.steps + 1, part)

    @torch.no_grad()
    def step(self, slopes: Sequence[Tensor], rate: float) -> None:
        """Move the weights along slopes at least as wide as float32, which are overwritten."""
        self._find_masters()
        moved, along = (moving(Params(*five), self.settings) for five in (self.masters, slopes))
        if self.settings.clip is not None and along:
            clip(along, self.norm(along), self.settings.clip)
        for weight, slope in zip(moved, along, strict=True):
            weight.grad = slope
        self.adam.param_groups[0]["lr"] = rate
        self.adam.step()
        self.adam.zero_grad()
        self.steps += 1
        for weight, master in zip(self.weights, self.masters, strict=True):
            if self.is_narrow:
                weight.copy_(master)

    def norm(self, slopes: Sequence[Tensor]) -> float:
        """Their common 2-norm."""
        return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(slope) for slope in slopes])))

    def export(self) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor] | None]:
        """The means of slopes and of their squares, and the weights before rounding where there are such."""
        first, second = ([self._moment(w, name) for w in self.masters] for name in ("exp_avg", "exp_avg_sq"))
        with torch.no_grad():
            self._find_masters()
        return first, second, list(self.masters) if self.is_narrow else None

    def restore(self, steps: int, first: list[Tensor], second: list[Tensor], masters: list[Tensor]) -> None:
        """Go on from what ``export`` gave; masters that the weights are not rounded from are left alone."""
        self.steps = steps
        for weight, m, v in zip(self.masters, first, second, strict=True):
            self.adam.state[weight] = {"step": torch.tensor(float(steps)), "exp_avg": m, "exp_avg_sq": v}
        with torch.no_grad():
            for held, master in zip(self.masters if self.is_narrow else (), masters, strict=False):
                held.copy_(master)

    def _find_masters(self) -> None:
        """Take the weights as they are where somebody else has moved them."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            if self.is_narrow:
                master.copy_(torch.where(master.to(weight.dtype) == weight, master, weight.to(master.dtype)))

    def _moment(self, weight: nn.Parameter, name: str) -> Tensor:
        return self.adam.state[weight][name] if weight in self.adam.state else torch.zeros_like(weight)


def add(total: list[Tensor] | None, slopes: Sequence[Tensor], share: float) -> list[Tensor]:
    """The slopes of a step so far, at least float32, with the share of another batch of it."""
    widened = [slope.to(wide(slope.dtype)) for slope in slopes]
    if total is None:
        return widened if share == 1 else [slope * share for slope in widened]
    return [t.add_(slope, alpha=share) for t, slope in zip(total, widened, strict=True)]


def clip(slopes: Sequence[Tensor], norm: float, largest: float) -> None:
    """Scale slopes in place so that their common 2-norm is at most ``largest``.

    PyTorch's own ``clip_grad_norm_`` adds 1e-6 to the norm.
    """
    if norm > largest:
        for slope in slopes:
            slope.mul_(largest / norm)
