"""One token of each text on a GPU, R1 to R11 and R13, without gradients: five kernels to a layer, and one launch for all.

What a token cannot do without is to read and write the state, and to read each weight. So a state is updated in place, and
its rows of silent neurons are left alone. Launching the kernels one by one would take several times as long as they run: from
the third token of a text on, a graph of them is replayed, which takes the token and leaves the logits where it did before.

Sums over neurons are sums of the parts that programs found, in an order that never changes, so that a run repeats to the bit.

Axes: B batch, h head, N neurons per head, D embedding width; G = h*B groups, each one head of one text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
import triton
from torch import Tensor

from bdh_spec.model import EPS
from bdh_torch import fused_kernels as kernels
from bdh_torch.fused import LEAST, PROGRAMS, Tiles
from bdh_torch.layer import Weights

TILE = 2**15  # bytes of a weight that a program works on at once
MOST = 64  # texts, or neurons, that it does so for
PIECES = 128  # programs that share the neurons of all heads, and each add up what the decoder makes of theirs: some one each
# Numbers of a state that a program works on at once: few, so that several programs of a multiprocessor take turns in waiting;
# and for how many times as many it adds up the attention, where there are programs enough.
ROWS, LONGEST = 2**13, 16
EAGER = 2  # tokens that are read kernel by kernel before a graph of them is worth its making

# A token of each text (B) and its position (1) to logits (B, V).
Read = Callable[[Tensor, Tensor], Tensor]


def gated(x: Tensor, weights: Weights, phases: tuple[Tensor, Tensor], state: Tensor) -> Tensor:
    """x (B, D), a token of each text, to the next x (B, D): a whole layer (R3 to R10, R13). ``state`` (G, N, D) is updated.

    ``phases`` are cosine and sine of each pair of neurons in turn (1, N), and of how far all are turned on (N).
    """
    (B, D), (h, _, N) = x.shape, weights.encoder.shape
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # Triton launches on the current device
        neurons, rotated = x.new_empty(2, h, B, N)
        tiles = tiles_of(B, D, x.dtype)
        programs = triton.cdiv(B, tiles.rows) * triton.cdiv(N, tiles.columns)
        operands = x, weights.encoder, *phases, neurons, rotated, h, B, 1, D, N, tiles.columns
        kernels.excite[(programs,)](*operands, **tiles.options(D))  # R3, R4
        yKV = _norm(_through(state, rotated, x), None, x.new_empty(h * B, D))  # R5, R13, R6
        return _norm(_write(yKV, neurons, weights), x, torch.empty_like(x))  # R7, R9, R10


def tiles_of(B: int, D: int, dtype: torch.dtype) -> Tiles:
    """Those of ``excite`` and ``write``, which hold their left operand."""
    most = min(max(TILE // (depth_of(D) * dtype.itemsize), LEAST), MOST)
    rows = min(max(triton.next_power_of_2(B), LEAST), most)
    return Tiles(rows, most, depth_of(D), 4 if rows < MOST else 8, 2)


def depth_of(D: int) -> int:
    """The side of a tile that holds all of a row."""
    return max(triton.next_power_of_2(D), LEAST)


def _through(state: Tensor, rotated: Tensor, v: Tensor) -> Tensor:
    """Attention in parts, (G, pieces, D), by way of a state that then remembers the token too (R13)."""
    (G, N, D), rows = state.shape, max(ROWS // depth_of(v.shape[1]), 1)
    span = rows * min(max(G * N // (rows * PROGRAMS), 1), LONGEST)
    pieces = triton.cdiv(N, span)
    parts = v.new_empty(G, pieces, D, dtype=torch.float32)
    operands = state, rotated, v, parts, len(v), D, N, span
    kernels.through[(G * pieces,)](*operands, ROWS=rows, DEPTH=depth_of(D), num_warps=4)
    return parts


def _write(yKV: Tensor, neurons: Tensor, weights: Weights) -> Tensor:
    """What the decoder makes of the neurons in parts, (B, h*pieces, D) (R7, R9)."""
    (h, B, N), D = neurons.shape, yKV.shape[1]
    tiles, pieces = tiles_of(B, D, yKV.dtype), max(PIECES // h, 1)
    span = triton.cdiv(triton.cdiv(N, pieces), tiles.columns) * tiles.columns
    pieces = triton.cdiv(N, span)
    parts = yKV.new_empty(B, h * pieces, D, dtype=torch.float32)
    options = {name: value for name, value in tiles.options(D).items() if name != "HELD"}
    programs = h * pieces * triton.cdiv(B, tiles.rows)
    operands = yKV, weights.encoder_v, neurons, weights.decoder, parts, h, B, D, N, span
    kernels.write[(programs,)](*operands, **options)
    return parts


def _norm(parts: Tensor, x: Tensor | None, target: Tensor) -> Tensor:
    """The norm of a sum of parts (b, many, D); or that of x and of this."""
    b, many, D = parts.shape
    sizes = {"SOME": max(2 * ROWS // depth_of(D), 1), "DEPTH": depth_of(D), "num_warps": 8}
    kernels.norm[(b,)](parts, target if x is None else x, target, many, D, EPS, ADDS=x is not None, **sizes)
    return target


class Steps(Sequence[Tensor]):
    """The states of all layers (G, N, D), and what reads a token of each text with them in place."""

    def __init__(self, layers: Sequence[Tensor]) -> None:
        self.layers = [memory.contiguous() for memory in layers]
        self.taken = 0  # tokens read
        self._graph: torch.cuda.CUDAGraph | None = None
        self._weights: list[int] = []  # where the weights lay that the graph reads
        self._tokens = self._position = self._logits = torch.empty(0)

    def __reduce__(self) -> tuple[Any, ...]:
        return Steps, (self.layers,)  # a copy makes its own graph

    def __len__(self) -> int:
        return len(self.layers)

    @overload
    def __getitem__(self, i: int) -> Tensor: ...

    @overload
    def __getitem__(self, i: slice) -> list[Tensor]: ...

    def __getitem__(self, i: int | slice) -> Tensor | list[Tensor]:
        return self.layers[i]

    def read(self, tokens: Tensor, position: int, weights: Sequence[Tensor], run: Read) -> Tensor:
        """Logits (B, V) of tokens (B) at a position: by ``run``, or by the graph of what it did with the same weights."""
        where = [weight.data_ptr() for weight in weights]
        self.taken += 1
        if not tokens.is_cuda or self.taken <= EAGER or torch.cuda.is_current_stream_capturing():
            return run(tokens, torch.tensor([position], device=tokens.device))
        if self._graph is None or where != self._weights:
            self._capture(tokens, position, run)
            self._weights = where
        self._tokens.copy_(tokens)
        self._position.fill_(position)
        assert self._graph is not None  # it was captured
        self._graph.replay()
        return self._logits.clone()

    def _capture(self, tokens: Tensor, position: int, run: Read) -> None:
        """Record what ``run`` does, which does nothing yet."""
        self._tokens, self._position = tokens.clone(), torch.tensor([position], device=tokens.device)
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(tokens.device)
        with torch.cuda.device(tokens.device), torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._logits = run(self._tokens, self._position)
