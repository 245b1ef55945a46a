"""One run on a GPU that says whether the fused kernels are right there, and how fast: a table, and JSON in $OUT if it is set.

The project need not be installed: `PYTHONPATH=.:backends/torch:conformance:bench python3 bench/gpu_check.py [SECTION...]`. It
takes some 100 seconds; the plain form is measured last, and left out where SECONDS_IN_ALL, 100 by default, leave no time for
it. What is right is looked at in processes of their own, side by side, since compiling takes most of their time; beside them
others compile what is measured afterwards. A section that fails is reported, and the next one begins.

Each kernel is measured with several tiles, and a training step and long texts with what ``fused`` says and with the best of
those found: a tile that is better is written into the tables of ``fused``.

Right is what the conformance suite allows against the specification, of which the worst share is told; at the default size the
error against float64 is told beside that of the plain kernel.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bdh_bench import plain_torch
from bdh_conformance.yardstick.cases import Case
from bdh_conformance.yardstick.tolerances import error, expect
from bdh_spec import BDHConfig
from bdh_spec import model as spec
from bdh_spec.gradients import gradients
from bdh_spec.rope import frequencies
from bdh_torch import BDH, forms, fused, fused_decode, fused_kernels, layer, streamed
from bdh_torch.attention import without_padding
from bdh_torch.backend import StreamedTorchBackend, TorchBackend
from bdh_torch.rope import Rotary, relative

STARTED = time.monotonic()
SECONDS = float(os.environ.get("SECONDS_IN_ALL", "100"))
COMPILING = 30  # seconds that the plain form may take to load what was compiled, and to run
HALF, CUDA = torch.bfloat16, torch.device("cuda")
DEFAULT = BDHConfig()
ROWS: list[tuple[str, str]] = []  # of the table: what, and how much
NUMBERS: dict[str, Any] = {}  # the same for programs


def tell(name: str, text: str, **numbers: Any) -> None:
    """A row of the table, at once."""
    ROWS.append((name, text))
    NUMBERS[name] = numbers or text
    print(f"[{time.monotonic() - STARTED:5.0f} s] {name}: {text}", flush=True)


def milliseconds(run: Callable[[], Any], times: int = 10, warm: int = 2) -> float:
    """The median time on the device."""
    for _ in range(warm):
        run()
    spans = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
    for before, after in spans:
        before.record()
        run()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in spans)


@contextmanager
def set_to(module: Any, **values: Any) -> Iterator[None]:
    """Attributes of a module, for a while."""
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def by_library() -> Any:
    """The streamed kernel in PyTorch's own operations."""
    return set_to(streamed, fuses=lambda x: False)


def ceilings() -> None:
    a, b = torch.randn(2, 8192, 8192, device=CUDA, dtype=HALF)
    out = torch.empty_like(a)
    took = milliseconds(lambda: torch.mm(a, b, out=out))
    tell("matmul bf16 8192^3", f"{2 * 8192**3 / took / 1e9:.0f} TFLOP/s", tflops=2 * 8192**3 / took / 1e9)
    source = torch.randint(255, (2**31,), device=CUDA, dtype=torch.uint8)
    target = torch.empty_like(source)
    took = milliseconds(lambda: target.copy_(source))
    tell("copy", f"{2 * 2**31 / took / 1e9:.2f} TB/s", tbs=2 * 2**31 / took / 1e9)


def products() -> None:
    """PyTorch's products that widen, in place and of operands that all heads share, are what a CPU makes of them."""
    a, b = torch.randn(3, 200, 100, device=CUDA, dtype=HALF), torch.randn(100, 64, device=CUDA, dtype=HALF)
    total = torch.randn(3, 200, 64, device=CUDA)
    for left, right, into in ((a, b.expand(3, -1, -1), total), (a.mT.contiguous().mT, b.expand(3, -1, -1), total)):
        wanted = into.double() + left.double() @ right.double()
        fused.add_product(into, left, right)
        off = ((into - wanted).norm() / wanted.norm()).item()
        off = max(off, ((fused.product(left, right) - left.double() @ right.double()).norm() / wanted.norm()).item())
        tell("products that widen", f"{off:.1e} off" + (" WRONG" if not off < 1e-6 else ""), off=off)


# Sizes that 16 divides and sizes that it does not: kernels are compiled for both. On both sides of what is held, D 256, and of
# how many texts are compared by the library. Beside each the tokens of a chunk.
SMALL = {
    "one tile": (Case(BDHConfig(2, 6, 0.0, 2, 8, 11), 3, 5, seed=1, scale=10), 5),
    "odd": (Case(BDHConfig(2, 5, 0.0, 3, 90, 7), 2, 19, seed=5, scale=10), 7),
    "tiles": (Case(BDHConfig(2, 70, 0.0, 2, 8, 11), 2, 150, seed=2, scale=10), 70),
    "whole tiles": (Case(BDHConfig(1, 64, 0.0, 2, 8, 11), 1, 128, seed=5, scale=10), 64),
    "many texts": (Case(BDHConfig(1, 16, 0.0, 2, 10, 11), 17, 21, seed=6, scale=10), 9),
    "D 250": (Case(BDHConfig(1, 250, 0.0, 2, 2, 11), 2, 33, seed=7, scale=3), 20),
    "D 264": (Case(BDHConfig(1, 264, 0.0, 2, 2, 11), 2, 33, seed=8, scale=3), 20),
}


def small(dtype: str) -> None:
    """Logits and gradients of small models, whole and in chunks, and token by token, as shares of what the suite allows."""
    with set_to(forms, FUSED={torch.float32, HALF, torch.float16}):
        for name, (case, chunk) in SMALL.items():
            try:
                one_model(name, replace(case, scale=1) if dtype == "float16" else case, chunk, dtype)  # it has no large scores
            except Exception as problem:  # noqa: BLE001  # a size that fails must not lose the others
                tell(f"right: {dtype} {name}", f"FAILED, {type(problem).__name__}: {str(problem)[:120]} WRONG")


def one_model(name: str, case: Case, chunk: int, dtype: str) -> None:
    logits = expect(lambda p: {"logits": spec.forward(case.tokens, p, case.config)}, case.params, dtype)
    slopes = expect(lambda p: gradients(case.tokens, case.targets, p, case.config)[1]._asdict(), case.params, dtype)
    for width in sorted({chunk, case.time}):
        with set_to(forms, CHUNK_ON_GPU=width, WHOLE_ON_GPU=width):
            model = StreamedTorchBackend().load(case.params, case.config, device=str(CUDA), dtype=dtype)
            found = {"logits": model.forward(case.tokens)}
            found |= model.gradients(case.tokens, case.targets)[1]._asdict()
        judge(f"right: {dtype} {name}, T={case.time} by {width}", logits | slopes, found)
    judge(f"right: {dtype} {name}, token by token", logits, {"logits": token_by_token(case, dtype)})


def judge(what: str, wanted: dict[str, Any], found: dict[str, Any]) -> None:
    """The worst share of what is allowed."""
    shares = {n: float(np.max(error(found[n], e.reference) / e.allowed)) for n, e in wanted.items()}
    most = max(shares, key=lambda n: np.nan_to_num(shares[n], nan=np.inf))
    tell(what, f"{shares[most]:.2f} of allowed ({most})" + ("" if shares[most] <= 1 else " WRONG"), **shares)


def token_by_token(case: Case, dtype: str) -> Any:
    """Logits as a text is written: two tokens at once, and then one after the other, soon by a graph."""
    model = TorchBackend().load(case.params, case.config, device=str(CUDA), dtype=dtype)
    logits, state = model.advance(model.init_state(case.batch), case.tokens[:, :2])
    rows = [logits]
    for token in np.split(case.tokens[:, 2:], case.time - 2, axis=1):
        logits, state = model.advance(state, token, donate=True)
        rows.append(logits)
    assert isinstance(state.native.layers, fused_decode.Steps)
    return np.concatenate(rows, axis=1)


def a_layer(T: int, B: int, dtype: torch.dtype) -> tuple[list[Tensor], Callable[[int], Any], Tensor]:
    """x and weights in float64, rotations by chunk, and a direction to take slopes along."""
    torch.manual_seed(T)
    c = DEFAULT
    x = layer.layer_norm(torch.randn(B, T, c.n_embd, device=CUDA)).to(dtype).double()
    shapes = (c.n_head, c.n_embd, c.n_neurons), (c.n_head, c.n_embd, c.n_neurons), (c.n_head * c.n_neurons, c.n_embd)
    weights = [(0.02 * torch.randn(shape, device=CUDA)).to(dtype).double() for shape in shapes]
    rotary = Rotary(c, "exact").to(CUDA)

    def rotations(chunk: int) -> Any:
        return relative(0, T, chunk, rotary.fixed, torch.float32, "exact")

    return [x, *weights], rotations, torch.randn(B, T, c.n_embd, device=CUDA).double()


def found(leaves: list[Tensor], dtype: torch.dtype, away: Tensor, run: Callable[..., Tensor]) -> list[Tensor]:
    """What a layer returns, and its slopes."""
    given = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    out = run(given[0], layer.Weights(*given[1:]))
    return [out.detach(), *torch.autograd.grad((out.double() * away).sum(), given)]


def default_size(dtype: torch.dtype) -> None:
    """A layer of the default size: whole, in chunks, with padding and with dropout."""
    one_layer(512, 2, 512, 0.0, 0, dtype)  # what is held
    one_layer(528, 1, 528, 0.0, 0, dtype)  # slopes of the neurons in steps
    one_layer(264, 8, 264, 0.0, 0, dtype)  # scores by the library
    one_layer(704, 2, 256, 0.0, 100, dtype)
    one_layer(304, 3, 304, 0.1, 100, dtype)


def one_layer(T: int, B: int, chunk: int, p: float, padding: int, dtype: torch.dtype) -> None:
    """Errors against float64, ours beside the plain kernel's."""
    leaves, rotations, away = a_layer(T, B, dtype)
    kept = torch.ones(B, T, device=CUDA)
    kept[0, :padding] = 0
    torch.manual_seed(1)
    mask = mask_of(fused.Dropout(p, int(torch.randint(2**62, ()))), B, T, dtype) if p else torch.ones((), device=CUDA)

    def attend(rotated: Tensor, v: Tensor) -> Tensor:
        return torch.bmm(torch.bmm(rotated, rotated.mT).tril(-1), without_padding(v, kept))

    def plainly(x: Tensor, weights: layer.Weights) -> Tensor:
        phases = torch.view_as_real(rotations(T).local).to(layer.wide(x.dtype))
        return layer.gated(x, weights, phases, attend, lambda values: values * mask.to(values.dtype))

    def ours(x: Tensor, weights: layer.Weights) -> Tensor:
        torch.manual_seed(1)
        return streamed.gated(x, weights, rotations(chunk), chunk, dropout=p, kept=kept)

    wanted, theirs = (found(leaves, kind, away, plainly) for kind in (torch.float64, dtype))
    with set_to(forms, FUSED={torch.float32, HALF, torch.float16}):
        mine = found(leaves, dtype, away, ours)
    names = ("decoded", "x", "encoder", "encoder_v", "decoder")
    off, plain = (
        [((m.double() - w).norm() / w.norm()).item() for m, w in zip(some, wanted, strict=True)] for some in (mine, theirs)
    )
    worst = max(range(5), key=lambda i: np.nan_to_num(off[i] / plain[i], nan=np.inf))
    bad = "" if off[worst] < 3 * plain[worst] + 1e-6 else " WRONG"
    how = f"T={T} by {chunk}" + f", {padding} padded" * bool(padding) + f", dropout {p}" * bool(p)
    text = f"{off[worst]:.1e} off in {names[worst]}, plain {plain[worst]:.1e}{bad}"
    tell(f"right: layer {str(dtype)[6:]} {how}", text, ours=off, plain=plain)


def mask_of(dropout: fused.Dropout, B: int, T: int, dtype: torch.dtype) -> Tensor:
    """The mask (h, B*T, N) that the kernels draw: what the gate makes of ones."""
    h, N, R = DEFAULT.n_head, DEFAULT.n_neurons, B * T
    ones, weight = torch.ones(h, R, 1, device=CUDA, dtype=dtype), torch.ones(h, 1, N, device=CUDA, dtype=dtype)
    mask = torch.ones(h, R, N, device=CUDA, dtype=dtype)
    tiles = fused.Tiles(64, 64, 32, 4, 2)
    programs = h * -(-R // 64) * -(-N // 64)
    fused_kernels.gate[(programs,)](
        ones, weight, mask, R, T, 1, N, T, 0, dropout.seed, dropout.p, dropout.scale, 64, True, **tiles.options(1)
    )
    return mask


def training(name: str, loss: Callable[[], Tensor], weights: list[torch.nn.Parameter], B: int, T: int) -> None:
    """Time and memory of a step."""
    adam = torch.optim.AdamW(weights, lr=1e-4, fused=True)

    def step() -> None:
        adam.zero_grad()
        with torch.autocast("cuda", HALF):
            value = loss()
        value.backward()
        adam.step()

    step()
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    took = milliseconds(step, 5, 1)
    peak = torch.cuda.max_memory_allocated() / 2**30
    tell(f"train B={B} T={T} {name}", f"{took:.1f} ms, {B * T / took:.0f} tokens/ms, {peak:.1f} GiB", ms=took, gib=peak)


def text(B: int, T: int) -> Tensor:
    return torch.randint(256, (B, T), device=CUDA)


def train_ours(dropout: float = 0.0, B: int = 32, T: int = 512, name: str = "fused") -> None:
    torch.manual_seed(0)
    model = BDH(BDHConfig(dropout=dropout), kernel="streamed").to(CUDA).train()
    tokens, targets = text(B, T), text(B, T)
    training(name, lambda: model(tokens, targets)[1], list(model.parameters()), B, T)


def train_fused() -> None:
    train_ours()
    if BEST:
        with set_to(fused, **BEST):
            train_ours(name="fused, best tiles")
    train_ours(0.1, name="fused, dropout 0.1")
    old = dict.fromkeys(fused.NARROW, OLD)
    with set_to(fused, NARROW=old, STEPPED=old, MANY=10**6):
        train_ours(name="fused, nothing held")
    with by_library():
        train_ours(name="streamed by PyTorch")


def profile() -> None:
    """What takes the time of a fused step."""
    torch.manual_seed(0)
    model = BDH(BDHConfig(dropout=0.0), kernel="streamed").to(CUDA).train()
    tokens = text(32, 512)

    def step() -> None:
        with torch.autocast("cuda", HALF):
            value = model(tokens, tokens)[1]
        value.backward()

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    spent = sorted(seen.key_averages(), key=lambda event: -event.self_device_time_total)
    whole = sum(event.self_device_time_total for event in spent) / 1e3
    print(f"profile of a fused step, {whole:.1f} ms in kernels:")
    for event in spent[:16]:
        print(f"  {event.self_device_time_total / 1e3:7.2f} ms {event.count:5d} x {event.key[:90]}")
    NUMBERS["profile"] = [(event.key, event.count, event.self_device_time_total / 1e3) for event in spent[:40]]


def plain_weights() -> tuple[plain_torch.Weights, list[torch.nn.Parameter]]:
    torch.manual_seed(0)
    model = BDH(BDHConfig(dropout=0.0)).to(CUDA)
    held = [model.embed.weight, model.encoder, model.encoder_v, model.decoder, model.lm_head]
    return plain_torch.Weights(*held, torch.from_numpy(frequencies(DEFAULT.n_neurons)).to(CUDA)), held


def compile_plain() -> None:
    """One step, of which the compiler keeps what it made."""
    weights, _ = plain_weights()
    forward, tokens = torch.compile(plain_torch.forward, dynamic=False), text(32, 512)
    with torch.autocast("cuda", HALF):
        logits = forward(tokens, weights, DEFAULT)
    F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten()).backward()


def train_plain() -> None:
    if time.monotonic() - STARTED > SECONDS - COMPILING:
        tell("train plain compiled", "no time left")
        return
    weights, held = plain_weights()
    forward = torch.compile(plain_torch.forward, dynamic=False)
    for B in (32, 8):
        tokens, targets = text(B, 512), text(B, 512)

        def loss(tokens: Tensor = tokens, targets: Tensor = targets) -> Tensor:
            return F.cross_entropy(forward(tokens, weights, DEFAULT).float().flatten(0, 1), targets.flatten())

        try:
            training("plain compiled", loss, held, B, 512)
            return
        except torch.OutOfMemoryError:
            tell(f"train B={B} T=512 plain compiled", "out of memory")
            torch.cuda.empty_cache()


@torch.no_grad()
def prefill() -> None:
    torch.manual_seed(0)
    model = BDH(DEFAULT, kernel="streamed").to(CUDA, HALF).eval()
    long, short = text(1, 32768), text(1, 2048)

    def read(tokens: Tensor) -> Callable[[], Any]:
        return lambda: model.advance(model.init_state(len(tokens)), tokens, donate=True)

    for chunk in (512, 1024, 2048):
        library = {**BEST, "MANY": 4, "STRIP": 512}
        for how, tables in {"": {}, ", best tiles": BEST, ", best tiles, scores by the library": library}.items():
            with set_to(forms, CHUNK_ON_GPU=chunk), set_to(fused, **tables):
                took = milliseconds(read(long), 3, 1)
            tell(f"prefill T=32768 fused, chunks of {chunk}{how}", f"{took:.1f} ms, {32768 / took:.0f} tokens/ms", ms=took)
    for T in (2048, 4096):
        tokens = text(1, T)
        for chunk, many in ((T, 4), (T, 32), (1024, 32)):
            with set_to(forms, CHUNK_ON_GPU=chunk, WHOLE_ON_GPU=chunk), set_to(fused, MANY=many):
                took = milliseconds(lambda tokens=tokens: model(tokens), 5, 2)
            tell(f"forward T={T} fused, chunks of {chunk}, library from {many} texts", f"{took:.2f} ms", ms=took)
    with by_library():
        tell("prefill T=32768 streamed by PyTorch", f"{milliseconds(read(long), 2, 1):.1f} ms")
        tell("forward T=2048 streamed by PyTorch", f"{milliseconds(lambda: model(short), 3, 1):.2f} ms")


# States are read and written once, weights read once: what a token cannot do without.
def bytes_of_a_token(B: int) -> int:
    c = DEFAULT
    return 2 * 4 * c.n_layer * B * c.n_head * c.n_neurons * c.n_embd + 2 * 3 * c.n_head * c.n_neurons * c.n_embd


@torch.no_grad()
def decode() -> None:
    """A token of each of 1 and of 64 texts, beside the plain recurrent step."""
    torch.manual_seed(0)
    model = BDH(DEFAULT).to(CUDA, HALF).eval()
    for B in (1, 64):
        token = text(B, 1)
        for changed in ({}, {"PIECES": 256}, {"ROWS": 2**13}, {"LONGEST": 4}, {"MOST": 32}):
            if B > 1 and "PIECES" in changed:
                continue
            _, state = model.advance(model.init_state(B), text(B, 8), donate=True)

            def step() -> None:
                nonlocal state
                _, state = model.advance(state, token, donate=True)  # noqa: B023  # called within this turn of the loop alone

            with set_to(fused_decode, **changed):
                took = milliseconds(step, 30 if B == 1 else 10, 5)
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(20):
                    step()
                torch.cuda.synchronize()
                wall = (time.perf_counter() - start) * 50
            rate = bytes_of_a_token(B) / took / 1e9
            what = ", ".join(f"{name} {value}" for name, value in changed.items())
            tell(f"decode B={B} fused {what}", f"{took:.3f} ms, {wall:.3f} by the clock, {rate:.2f} TB/s", ms=took, wall=wall)
            del state
        torch.cuda.empty_cache()
        plain_decode(B, token)
        torch.cuda.empty_cache()


def plain_decode(B: int, token: Tensor) -> None:
    weights, _ = plain_weights()
    weights = plain_torch.Weights(*(w.to(HALF) for w in weights[:5]), weights.freqs)
    c = DEFAULT
    state = [torch.zeros(B, c.n_head, c.n_neurons, c.n_embd, device=CUDA) for _ in range(c.n_layer)]

    def step() -> None:
        nonlocal state
        with torch.autocast("cuda", HALF):
            _, state = plain_torch.step(token, state, 8, weights, c)

    took = milliseconds(step, 5, 2)
    tell(f"decode B={B} plain", f"{took:.3f} ms", ms=took)


OLD = fused.Tiles(128, 64, 64, 8, 3)  # nothing is held
CANDIDATES: dict[str, list[tuple[int, ...]]] = {
    "excite": [(128, 32, 256, 8, 2), (128, 32, 256, 8, 3), (128, 64, 256, 8, 2), (256, 32, 256, 8, 2), (64, 32, 256, 4, 3)],
    "compare": [(128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (128, 128, 64, 4, 4), (128, 128, 64, 8, 4)],
    "gate": [(128, 32, 256, 8, 2), (128, 32, 256, 8, 3), (128, 64, 256, 8, 3), (128, 128, 256, 8, 2), (256, 64, 256, 8, 2)],
    "undo_gate": [(128, 32, 256, 8, 2), (64, 64, 256, 8, 2), (64, 32, 256, 4, 2), (64, 64, 256, 4, 2), (128, 64, 64, 8, 3)],
    "undo_turn": [(128, 32, 512, 8, 2), (64, 64, 512, 8, 2), (64, 32, 512, 4, 2), (128, 64, 64, 8, 3), (128, 128, 64, 8, 3)],
}
BEST: dict[str, Any] = {}  # tables of ``fused`` that were found to be the fastest


class Alone:
    """Each kernel alone on 8 texts of 512 tokens and all heads."""

    def __init__(self) -> None:
        leaves, rotations, _ = a_layer(512, 8, HALF)
        x, weights = leaves[0].to(HALF), layer.Weights(*(leaf.to(HALF) for leaf in leaves[1:]))
        (self.piece,) = next(fused._pieces(x, x, fused._contiguous(weights, HALF), rotations(512), 512, fused.Dropout()))
        piece = self.piece
        self.neurons, self.rotated = piece.excite()
        self.scores = piece.compare(self.rotated)
        self.attention = piece.attend(self.scores)
        self.d, self.slopes = x.view(-1, piece.D), fused._Slopes.zeros(x, piece.weights)
        self.room = self.neurons.new_empty(3, *self.neurons.shape)
        self.product = 2 * len(self.d) * piece.N * piece.D * piece.h  # of rows with a weight, in FLOP

    def runs(self) -> dict[str, tuple[Callable[[], Any], float]]:
        """By the name of a kernel, how it is run, and its FLOP."""
        return {
            "excite": (self.piece.excite, self.product),
            "compare": (lambda: self.piece.compare(self.rotated), self.product),
            "gate": (lambda: self.piece.gate(self.room[0], self.attention), self.product),
            "undo_gate": (self.undo_gate, 2 * self.product),
            "undo_turn": (self.undo_turn, 2 * self.product),
        }

    def undo_gate(self) -> None:
        piece, R = self.piece, len(self.d)
        operands = piece._normed(self.attention), piece.weights.encoder_v, self.d, piece.weights.decoder, self.neurons
        piece._run("undo_gate", piece.D, R, piece.N, piece.h, *operands, *self.room, **piece._drawn(R))

    def undo_turn(self) -> None:
        piece = self.piece
        operands = self.scores, self.rotated, self.rotated, *piece.phases, self.neurons, self.room[0], piece.C, piece.N
        piece._run("undo_turn", piece.C, piece.C, piece.N, piece.h * piece.G, *operands, ADDS=False)

    def library(self) -> dict[str, Callable[[], Any]]:
        """Products of as many FLOP with nothing after them."""
        piece, neurons, d, slopes = self.piece, self.neurons, self.d, self.slopes
        rows = d.expand(piece.h, -1, -1)
        return {
            "x @ encoder": lambda: torch.bmm(rows, piece.weights.encoder, out=self.room[0]),
            "xy_sparse @ decoder": lambda: fused.product(neurons, piece.weights.decoder).sum(0),
            "xy_sparse.T @ d": lambda: fused.add_product(slopes.weights.decoder, neurons.mT, rows),
            "yKV.T @ d_opened": lambda: fused.add_product(slopes.weights.encoder, rows.mT, neurons),
            "d_opened @ encoder_v.T": lambda: fused.product(neurons, piece.weights.encoder_v.mT),
        }


def chosen(name: str, candidate: tuple[int, ...]) -> Any:
    """A kernel with these tiles, and scores by the kernel."""
    tables = {table: {**getattr(fused, table), name: fused.Tiles(*candidate)} for table in ("NARROW", "STEPPED")}
    return set_to(fused, **tables, **({"MANY": 10**6} if name == "compare" else {}))


@torch.no_grad()
def compile_tiles(name: str) -> None:
    """Run a kernel once with each of its tiles: what Triton compiled it keeps."""
    alone = Alone()
    for candidate in CANDIDATES[name]:
        with chosen(name, candidate):
            try:
                alone.runs()[name][0]()
            except Exception as problem:  # noqa: BLE001  # it is told of where it is measured
                print(name, candidate, type(problem).__name__)


@torch.no_grad()
def tiles() -> None:
    """The time of each kernel by a few tiles, the least of which are the BEST, and of the library's products."""
    alone, best = Alone(), dict(fused.NARROW)
    for name, (run, flop) in alone.runs().items():
        least = np.inf
        for candidate in CANDIDATES[name]:
            with chosen(name, candidate):
                try:
                    took = milliseconds(run, 10, 3)
                except Exception as problem:  # noqa: BLE001  # a tile that does not fit must not lose the others
                    tell(f"kernel {name} {candidate}", f"failed: {str(problem)[:80]}")
                    continue
            tell(f"kernel {name} {candidate}", f"{took:.3f} ms, {flop / took / 1e9:.0f} TFLOP/s", ms=took)
            if took < least:
                least, best[name] = took, fused.Tiles(*candidate)
        tell(f"best of {name}", str(tuple(best[name])), ms=least)
    BEST["NARROW"] = best
    BEST["STEPPED"] = {name: tile if tile.depth < alone.piece.D else fused.STEPPED[name] for name, tile in best.items()}
    for programs in (256, 1024, 2048):
        with set_to(fused, PROGRAMS=programs, **BEST):
            took = [milliseconds(run, 10, 2) for name, (run, _) in alone.runs().items() if name in fused.SPANNING]
        tell(f"PROGRAMS {programs}, best tiles", ", ".join(f"{each:.3f}" for each in took) + " ms", ms=took)
    for strip in (128, 256, 512):
        with set_to(fused, STRIP=strip):
            took = milliseconds(lambda: alone.piece.compare(alone.rotated), 10, 3)
            tell(f"compare by the library, STRIP {strip}", f"{took:.3f} ms, {alone.product / took / 1e9:.0f} TFLOP/s", ms=took)
    for name, product in alone.library().items():
        took = milliseconds(product, 10, 3)
        tell(f"library {name}", f"{took:.3f} ms, {alone.product / took / 1e9:.0f} TFLOP/s", ms=took)


RIGHT: dict[str, Callable[[], None]] = {
    "small_float32": lambda: small("float32"),
    "small_bfloat16": lambda: small("bfloat16"),
    "small_float16": lambda: small("float16"),
    "layer_float32": lambda: default_size(torch.float32),
    "layer_bfloat16": lambda: default_size(HALF),
    "layer_float16": lambda: default_size(torch.float16),
}
COMPILED: dict[str, Callable[[], None]] = {
    "compile_plain": compile_plain,
    **{f"compile_{name}": partial(compile_tiles, name) for name in CANDIDATES},
}
SECTIONS: dict[str, Callable[[], None]] = {
    "products": products,
    "right": lambda: side_by_side([*RIGHT, *COMPILED]),
    "ceilings": ceilings,
    "tiles": tiles,
    "train_fused": train_fused,
    "decode": decode,
    "prefill": prefill,
    "profile": profile,
    "train_plain": train_plain,
}


def side_by_side(names: list[str]) -> None:
    """Sections in processes of their own."""
    running = {
        name: subprocess.Popen([sys.executable, __file__, name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for name in names
    }
    for name, process in running.items():
        said, _ = process.communicate()
        rows = [line for line in said.splitlines() if line.startswith("[")]
        print(said, flush=True)
        for row in rows:
            what, _, much = row.partition("] ")[2].rpartition(": ")
            ROWS.append((what, much))
        NUMBERS[name] = rows or said[-2000:]


def main(names: list[str]) -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {fused.triton.__version__}", flush=True)
    for name in names or SECTIONS:
        try:
            (SECTIONS | RIGHT | COMPILED)[name]()
        except Exception as problem:  # noqa: BLE001  # a section that fails must not lose the others
            traceback.print_exc(limit=-6)
            tell(f"section {name}", f"FAILED, {type(problem).__name__}: {str(problem)[:160]}")
        torch.cuda.empty_cache()
        if (folder := os.environ.get("OUT")) and (not names or names[0] in SECTIONS):
            (Path(folder) / "gpu_check.json").write_text(json.dumps(NUMBERS, indent=1, default=str), encoding="utf-8")
    if not names or names[0] in SECTIONS:
        print()
        for row, value in ROWS:
            print(f"{row:58} {value}")


if __name__ == "__main__":
    main(sys.argv[1:])
