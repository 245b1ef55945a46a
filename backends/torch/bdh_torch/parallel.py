"""Training on several processes: texts, neurons and weights shared on a mesh, each by what PyTorch has for it.

- data: each process reads its own texts of a batch, and slopes are summed once a step. Layers share their weights, so no slope
  is whole before the backward pass has left the first one: there is nothing that a sum could hide behind.
- neurons: some of the neurons of every head make a BDH of their own, with the frequencies of those neurons. What the shares see
  (R5) and what they decode (R9) is summed, by DTensors, which know what of a gradient is part of a sum.
- weights: FSDP2 (``fully_shard``) keeps a slice of the width of each weight and its moments, and gathers weights for a pass.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from bdh_spec import AdamW, BDHConfig, CapabilityError, Frequencies, OptimizerState, Spread, Team
from bdh_spec.model import RecurrentState as ExportedState
from bdh_spec.model import frequencies_of
from bdh_spec.optimizer import dropout_seed, moving
from bdh_spec.params import Array, Params
from bdh_spec.protocol import Batch, own_texts
from bdh_spec.rope import Phase
from bdh_torch.attention import Note, unnoted
from bdh_torch.backend import NAMES, TorchModel, filled, from_numpy, to_numpy
from bdh_torch.forms import Kernel
from bdh_torch.layer import Attend, gated, residual
from bdh_torch.model import BDH, RecurrentState
from bdh_torch.optimizer import Optimizer

DATA, NEURONS = "data", "neurons"  # the axes of a mesh


class Cut(NamedTuple):
    """Along which of its axes a weight is cut by each axis of the mesh."""

    width: int  # by DATA, where weights are shared
    neurons: int | None  # by NEURONS, where it has any


CUTS = Params(
    embed=Cut(1, None),  # V D
    encoder=Cut(1, 2),  # h D N
    encoder_v=Cut(1, 2),  # h D N
    decoder=Cut(2, 1),  # h N D
    lm_head=Cut(0, None),  # D V
)


def leave() -> None:
    """Take leave of the other processes: threads that a group still has when Python ends abort it."""
    gc.collect()
    if distributed.is_initialized():
        distributed.destroy_process_group()


class TorchTeam(Team):
    """The processes that torchrun started."""

    def __init__(self) -> None:
        if not distributed.is_initialized():
            distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
            atexit.register(leave)
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()

    def any(self, wish: bool) -> bool:
        return added(float(wish)) > 0

    def wait(self) -> None:
        distributed.barrier()


class ShareOfNeurons(BDH):
    """A BDH of some of the neurons, which sees and decodes together with the others.

    It reads by the plain kernel at every size: the streamed one and that of single tokens go through a layer without a stop at
    which shares could meet.
    """

    def __init__(self, config: BDHConfig, mesh: DeviceMesh, phase: Phase) -> None:
        super().__init__(config, phase=phase, kernel="plain")
        self.mesh = mesh

    def _layer(self, x: Tensor, rotations: Tensor, attend: Attend, note: Note = unnoted) -> Tensor:
        def attend_together(rotated: Tensor, v: Tensor) -> Tensor:
            return self._for_each(self._summed(attend(rotated, v)))

        return residual(x, self._summed(gated(self._for_each(x), self.weights, rotations, attend_together, self.drop)))

    def _summed(self, part: Tensor) -> Tensor:
        """What the parts of all shares add up to; the slope of each is the sum's."""
        parts = DTensor.from_local(part, self.mesh, [Partial()], run_check=False)
        return parts.redistribute(placements=[Replicate()]).to_local()

    def _for_each(self, x: Tensor) -> Tensor:
        """What all shares read; its slope is the sum of theirs."""
        return DTensor.from_local(x, self.mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


class SpreadOptimizer(Optimizer):
    """AdamW over what is here of the weights: it moves each value by itself, but for the clipping."""

    def __init__(self, weights: Sequence[nn.Parameter], settings: AdamW, counted: Params) -> None:
        super().__init__(weights, settings)
        self.counted = counted

    def next_seed(self, part: int) -> int:
        """That of a run which reads what each process does as a batch of its own."""
        return dropout_seed(self.settings.seed, self.steps + 1, part * distributed.get_world_size() + distributed.get_rank())

    def norm(self, slopes: Sequence[Tensor]) -> float:
        """The common 2-norm of the slopes everywhere, of which each is counted in one place."""
        counted = moving(self.counted, self.settings)
        return float(
            added(sum(float(s.double().square().sum()) for s, is_mine in zip(slopes, counted, strict=True) if is_mine)) ** 0.5
        )


class SpreadModel(TorchModel):
    """A BDH on a mesh of processes, for training: every process asks it the same, at the same time."""

    def __init__(
        self,
        params: Params,
        config: BDHConfig,
        spread: Spread,
        *,
        device: str,
        dtype: str,
        phase: Phase,
        kernel: Kernel | None = None,
    ) -> None:
        if not distributed.is_initialized() or distributed.get_world_size() != spread.size:
            here = distributed.get_world_size() if distributed.is_initialized() else 1
            raise CapabilityError(
                f"{here} processes for a model that {spread.size} share: torchrun --nproc-per-node {spread.size} starts as many"
            )
        self.spread = spread
        self.mesh = init_device_mesh(torch.device(device).type, (spread.data, spread.neurons), mesh_dim_names=(DATA, NEURONS))
        self.place, self.share = (self.mesh.get_local_rank(axis) for axis in (DATA, NEURONS))
        super().__init__(params, config, device=device, dtype=dtype, phase=phase, kernel=kernel)

    def params(self) -> Params:
        return self._whole([piece.to(getattr(torch, self.dtype)) for piece in self._pieces()])

    def _lacks(self, verb: str) -> CapabilityError:
        return CapabilityError(f"a model on several processes has no {verb}: load it without a spread")

    def _gradients(self, tokens: Array, targets: Array) -> tuple[float, Params]:
        raise self._lacks("gradients")

    def _trace(self, tokens: Array) -> dict[str, Array]:
        raise self._lacks("trace")

    def _forward_padded(self, tokens: Array, lengths: Array) -> Array:
        raise self._lacks("padded")

    def _export_state(self, native: Any) -> tuple[Array, ...]:
        raise self._lacks("state")

    def _import_state(self, state: ExportedState) -> RecurrentState:
        raise self._lacks("state")

    def _module(self, params: Params, kernel: Kernel | None) -> BDH:
        """This process's share of the neurons, and of it the slice that FSDP2 leaves here."""
        c, shares = self.config, self.spread.neurons
        own = Frequencies(np.split(frequencies_of(c), shares)[self.share])
        c = replace(c, mlp_internal_dim_multiplier=c.mlp_internal_dim_multiplier // shares, freqs=own)

        def empty() -> BDH:
            return BDH(c, phase=self.phase, kernel=kernel) if shares == 1 else ShareOfNeurons(c, self.mesh[NEURONS], self.phase)

        held = self._flat(self._with_own_neurons(params))
        module = filled(empty, held, self.device, self.wide if self.spread.shares_weights else self.dtype)
        return self._sliced(module) if self.spread.shares_weights else module

    def _sliced(self, module: BDH) -> BDH:
        """The module, keeping slices in at least float32 and gathering them in the model's dtype."""
        cuts = {module.get_parameter(name): cut.width for name, cut in zip(NAMES, CUTS, strict=True)}
        cuts[module.decoder] = 1  # which is flat
        fully_shard(
            module,
            mesh=self.mesh[DATA],
            reshard_after_forward=True,  # slices whenever nobody computes, also after a pass that no gradient follows
            shard_placement_fn=lambda weight: Shard(cuts[weight]),
            mp_policy=MixedPrecisionPolicy(getattr(torch, self.dtype), getattr(torch, self.wide)),
        )
        register_fsdp_forward_method(module, "advance")
        return module

    def _optimizer(self, settings: AdamW) -> Optimizer:
        return SpreadOptimizer([nn.Parameter(piece) for piece in self._pieces()], settings, self._counted())

    def _total(self, native: Any, batches: list[Batch]) -> tuple[float, list[Tensor]]:
        own, readers = own_texts(batches, self.place, self.spread.data), self.mesh.get_group(DATA)
        if self.spread.shares_weights:
            value, slopes = self._by_fsdp(native, own)
        else:
            value, slopes = super()._total(native, own)
            for slope in slopes:
                distributed.all_reduce(slope, group=readers)
        return added(value, readers), slopes

    def _by_fsdp(self, native: Any, batches: list[Batch]) -> tuple[float, list[Tensor]]:
        """The loss here, and this slice of the slopes everywhere: FSDP2 sums over batches and takes the mean over readers."""
        value = 0.0
        for part, (tokens, targets, share) in enumerate(batches):
            with self._dropping(native.next_seed(part)):
                _, loss = self.module(self._to_device(tokens), self._to_device(targets))
                (loss * (share * self.spread.data)).backward()
            value += share * loss.item()
        slopes = [local(weight.grad) for weight in self._weights() if weight.grad is not None]
        self.module.zero_grad()
        return value, slopes

    def _export_optimizer(self, native: Any) -> OptimizerState:
        first, second, masters = native.export()
        if self.dtype != self.wide and masters is None:  # the slices themselves are not rounded
            masters = self._pieces()
        return OptimizerState(native.settings, native.steps, *(held and self._whole(held) for held in (first, second, masters)))

    def _import_optimizer(self, state: OptimizerState) -> Optimizer:
        native = self._optimizer(state.settings)
        native.restore(state.step, *(self._own(five) for five in (state.first, state.second, state.masters)))
        return native

    def _pieces(self) -> list[Tensor]:
        """What is here of the weights, in the memory that they have."""
        return [local(weight) for weight in self._weights()]

    def _counted(self) -> Params:
        """Of which weights a sum over all processes takes what is here, so that it takes everything once."""
        by_data = self.spread.shares_weights or self.place == 0
        return Params(*(by_data and (cut.neurons is not None or self.share == 0) for cut in CUTS))

    def _own(self, five: Params | None) -> list[Tensor]:
        """What belongs here of five values of the weights' shapes."""
        if five is None:
            return []
        held = self._with_own_neurons(five)
        if self.spread.shares_weights:
            held = Params(*(one_of(v, cut.width, self.place, self.spread.data) for v, cut in zip(held, CUTS, strict=True)))
        return [from_numpy(value, self.device, self.wide) for value in self._flat(held)]

    def _with_own_neurons(self, five: Params) -> Params:
        """The neurons of this share in five values of the weights' shapes; the decoder's with an axis of heads (h, N, D)."""
        apart = five._replace(decoder=five.decoder.reshape(self.config.n_head, self.config.n_neurons, -1))
        return Params(*(one_of(v, cut.neurons, self.share, self.spread.neurons) for v, cut in zip(apart, CUTS, strict=True)))

    def _flat(self, five: Params) -> Params:
        """The same with the decoder as checkpoints have it: (h*N, D)."""
        return five._replace(decoder=five.decoder.reshape(-1, five.decoder.shape[-1]))

    def _whole(self, pieces: Sequence[Tensor]) -> Params:
        """Five values of the weights' shapes, from what is here and elsewhere of them."""
        held = Params(*(piece.detach() for piece in pieces))
        held = held._replace(decoder=held.decoder.unflatten(0, (self.config.n_head, -1)))
        return self._flat(Params(*(self._gathered(piece, cut) for piece, cut in zip(held, CUTS, strict=True))))

    def _gathered(self, piece: Tensor, cut: Cut) -> Array:
        width = Shard(cut.width) if self.spread.shares_weights else Replicate()
        neurons = Replicate() if cut.neurons is None else Shard(cut.neurons)
        return to_numpy(DTensor.from_local(piece, self.mesh, [width, neurons], run_check=False).full_tensor())


def local(value: Tensor) -> Tensor:
    """What is here of a tensor, in its memory."""
    return (value.to_local() if isinstance(value, DTensor) else value).detach()


def one_of(value: Array, axis: int | None, number: int, many: int) -> Array:
    """One of as many equal parts along an axis, or all of a value that has no such axis."""
    return value if axis is None else np.split(value, many, axis)[number]


def added(value: float, group: Any = None) -> float:
    """The sum over processes."""
    total = torch.tensor(value, dtype=torch.float64)
    distributed.all_reduce(total, group=group)
    return total.item()
