"""The figures of the README: errors of every port, memory of decoding, and bdh_torch against the plain listing.

python examples/measure.py errors | memory | speed | generate
"""

from __future__ import annotations

import importlib.util
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import bdh_spec
from bdh_conformance.yardstick.cases import CONFIGS, Case
from bdh_conformance.yardstick.tolerances import Expectation, error, expect
from bdh_spec import Model, RecurrentState
from bdh_spec import model as spec
from bdh_spec.gradients import gradients
from bdh_torch import BDH, BDHConfig

PORTS = ("numpy", "torch", "jax", "mlx")
Named = dict[str, np.ndarray]

say = Console(width=None if sys.stdout.isatty() else 120, highlight=False)


@click.group()
def main() -> None:
    """Measure what the README states."""


@main.command()
@click.option("--seeds", default=5, show_default=True)
def errors(seeds: int) -> None:
    """Per port and dtype, over small cases: the median worst row, and the largest share of what is allowed."""
    cases = [Case(c, time=8, seed=seed, scale=s) for c in CONFIGS.values() for seed in range(seeds) for s in (1.0, 20.0)]
    table = Table(
        "port", "dtype", "logits", "of allowed", "traces", "of allowed", "decode", "of allowed", "gradients", "of allowed"
    )
    for port in PORTS:
        backend = bdh_spec.get_backend(port)
        for dtype in backend.capabilities.dtypes:
            found = [worst(backend.load(case.params, case.config, device="cpu", dtype=dtype), case, dtype) for case in cases]
            cells = [f([row[i] for row in found]) for i in range(4) for f in (typical, largest_share)]
            table.add_row(port, dtype, *cells)
    say.print(table)
    say.print(f"{len(cases)} cases: {', '.join(CONFIGS)}; fresh weights and twenty times that; T = 8, decode split 3 1 1 3")


def worst(model: Model, case: Case, dtype: str) -> list[tuple[float, float]]:
    """Error and share of the allowed error, for logits, traces, decoding and gradients."""
    traced = expect(lambda p: spec.trace(case.tokens, p, case.config), case.params, dtype)
    decoded = expect(lambda p: {"logits": spec.forward(case.tokens, p, case.config)}, case.params, dtype)
    slopes = expect(lambda p: gradients(case.tokens, case.targets, p, case.config)[1]._asdict(), case.params, dtype)
    return [
        shares({"logits": model.forward(case.tokens)}, {"logits": traced["logits"]}),
        shares(model.trace(case.tokens), traced),
        shares({"logits": in_pieces(model, case)}, decoded),
        shares(model.gradients(case.tokens, case.targets)[1]._asdict(), slopes),
    ]


def shares(actual: Named, expected: dict[str, Expectation]) -> tuple[float, float]:
    found = {name: error(actual[name], e.reference) for name, e in expected.items()}
    return max(found.values()), max(found[name] / e.allowed for name, e in expected.items())


def in_pieces(model: Model, case: Case) -> np.ndarray:
    state, logits = model.init_state(case.batch), []
    for chunk in np.split(case.tokens, [3, 4, 5], axis=1):
        part, state = model.advance(state, chunk, donate=True)
        logits.append(part)
    return np.concatenate(logits, axis=1)


def typical(pairs: list[tuple[float, float]]) -> str:
    return f"{statistics.median(pair[0] for pair in pairs):.1e}"


def largest_share(pairs: list[tuple[float, float]]) -> str:
    return f"{max(pair[1] for pair in pairs):.2f}"


@main.command()
@click.option("--port", help="Measure one port in this very process.")
def memory(port: str | None) -> None:
    """Peak memory of a process that decodes at position 10, then at 100,000, then 2,000 tokens further."""
    if port:
        say.print(*decode_peaks(port))
        return
    table = Table("port", "MB before", "peak at 10", "peak at 100,000", "2,000 tokens later")
    for name in PORTS:
        command = [sys.executable, __file__, "memory", "--port", name]
        table.add_row(name, *subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    say.print(table)


def decode_peaks(port: str) -> list[str]:
    model = bdh_spec.load(backend=port, device="cpu")
    _, state = model.advance(model.init_state(1), np.frombuffer(b"The dragon", np.uint8)[None])
    far = model.import_state(RecurrentState(100_000, model.export_state(state).layers))
    peaks = [peak()]
    for start, tokens in ((state, 50), (far, 50), (far, 2000)):
        here = model.import_state(model.export_state(start))
        for _ in model.stream(b"x", tokens, seed=1, state=here):
            pass
        peaks.append(peak())
    return [f"{value:.1f}" for value in peaks]


def peak() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**20 if sys.platform == "darwin" else 2**10)


@main.command()
@click.option("--layers", default=6, show_default=True)
@click.option("--rounds", default=5, show_default=True)
def speed(layers: int, rounds: int) -> None:
    """bdh_torch against the plain listing at the default size, in turns: medians in milliseconds, and their ratio."""
    config = BDHConfig(n_layer=layers)
    ours = BDH(config)
    plain = listing().PlainBDH(config)
    plain.load_state_dict(ours.state_dict())
    idx = torch.randint(256, (1, 512))
    table = Table("what", "plain", "bdh_torch", "plain / ours")

    def row(what: str, *runs: Callable[[], object]) -> None:
        times: list[list[float]] = [[], []]
        for i in range(rounds + 1):
            for run, found in zip(runs, times, strict=True):
                start = time.perf_counter()
                run()
                found.extend([time.perf_counter() - start] if i else [])  # the first round warms up
        medians = [1000 * statistics.median(found) for found in times]
        table.add_row(what, *(f"{m:.0f}" for m in medians), f"{medians[0] / medians[1]:.2f}")

    for dtype in (torch.float32, torch.bfloat16):
        plain.to(dtype).eval(), ours.to(dtype).eval()
        name = str(dtype).removeprefix("torch.")
        row(f"forward B1 T512 {name}", *(torch.no_grad()(lambda m=m: m(idx)) for m in (plain, ours)))
        row(f"gradient B1 T512 {name}", *(lambda m=m: m(idx, idx)[1].backward() for m in (plain, ours)))
    plain.float(), ours.float()
    text = torch.randint(256, (1, 256))
    _, state = torch.no_grad()(ours.advance)(ours.init_state(1), text)
    row(
        "token 257 float32",
        torch.no_grad()(lambda: plain(text)),
        torch.no_grad()(lambda: ours.advance(state, text[:, :1], donate=True)),
    )
    say.print(table)


@main.command()
@click.option("--layers", default=6, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--new", default=24, show_default=True, help="Tokens of each text.")
def generate(layers: int, rounds: int, new: int) -> None:
    """A greedy token by BDHForCausalLM.generate against bdh_torch's, default size, prompt of 256: medians, and their ratio."""
    from bdh_transformers import BDHConfig as Sizes
    from bdh_transformers import BDHForCausalLM

    theirs = BDHForCausalLM(Sizes(num_hidden_layers=layers)).eval()
    ours = BDH(theirs.config.sizes)
    weights = {name.removeprefix("backbone."): weight for name, weight in theirs.state_dict().items()}
    head = weights.pop("lm_head.weight").T
    ours.load_state_dict({**weights, "lm_head": head, "attn.freqs": ours.attn.freqs})
    idx = torch.randint(256, (1, 256))
    runs: dict[str, Callable[[int], object]] = {
        "bdh_torch": lambda n: ours.generate(idx, n, temperature=0),
        "transformers": lambda n: theirs.generate(idx, max_new_tokens=n, do_sample=False),
    }
    found: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            per_token = (seconds(lambda: run(new + 1)) - seconds(lambda: run(1))) / new  # noqa: B023  called at once
            found[name].extend([1000 * per_token] if i else [])  # the first round warms up
    medians = {name: statistics.median(times) for name, times in found.items()}
    table = Table("bdh_torch ms", "transformers ms", "transformers / bdh_torch")
    table.add_row(*(f"{m:.1f}" for m in medians.values()), f"{medians['transformers'] / medians['bdh_torch']:.2f}")
    say.print(table)


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def listing() -> ModuleType:
    """The plain listing that the tests keep."""
    path = Path(__file__).parent.parent / "tests" / "bdh_torch" / "conftest.py"
    found = importlib.util.spec_from_file_location("plain_listing", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
