"""elements.c does what PyTorch's operations do, to the bit where both are exact; and nobody needs a compiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bdh_torch import elements, native
from bdh_torch.elements import Phases

KINDS = list(native.KINDS)
# Texts, their places, and neurons: less than a vector, ragged, and so many that threads share the rows.
SIZES = {"small": (1, 3, 2), "ragged": (2, 5, 38), "threads": (3, 64, 256)}
each_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
each_size = pytest.mark.parametrize(("texts", "C", "n"), SIZES.values(), ids=SIZES)
EXACT = torch.tensor([-1, -0.5, -0.25, 0, 0.25, 0.5, 1])  # cosines and sines by which small whole numbers turn without rounding


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """What was compiled, or could not be, in an environment of a test."""
    native.compiled.cache_clear()
    yield
    native.compiled.cache_clear()


class Given:
    """Whole numbers, and phases by which they turn without rounding."""

    def __init__(self, texts: int, C: int, n: int, kind: torch.dtype) -> None:
        self.draw = torch.Generator().manual_seed(texts * n)
        self.R, self.C, self.n, self.kind = texts * C, C, n, kind

    def values(self) -> Tensor:
        return torch.randint(-7, 8, (self.R, self.n), generator=self.draw).to(self.kind)

    def mask(self) -> Tensor:
        return torch.randint(0, 2, (self.R, self.n), generator=self.draw).to(self.kind).mul_(2)

    def phases(self, *, shifted: bool) -> Phases:
        local, shift = (EXACT[torch.randint(7, (rows, self.n, 2), generator=self.draw)] for rows in (self.C, 1))
        by = Phases(torch.view_as_complex(local)[:, : self.n // 2], torch.view_as_complex(shift.sign())[0, : self.n // 2])
        return by if shifted else by._replace(shift=None)


def within_more(values: Tensor) -> Tensor:
    """A copy that is a block of a wider matrix, as the streamed kernel has them."""
    rows, n = values.shape
    wider = values.new_full((rows, 3 * n), torch.nan)
    wider[:, n : 2 * n] = values
    return wider[:, n : 2 * n]


def gate(neurons: Tensor, opened: Tensor) -> None:
    """The gate, less what may be lost."""
    elements.gate(neurons, opened)
    opened.zero_()


def both(monkeypatch: pytest.MonkeyPatch, do: Callable[..., None], *given: object) -> None:
    """Do it in C and by PyTorch's operations: what either writes must be the same."""
    assert all(native.compiled(kind) for kind in KINDS)
    results = []
    for in_c in (True, False):
        own = [within_more(value) if isinstance(value, Tensor) else value for value in given]
        with monkeypatch.context() as patch:
            if not in_c:
                patch.setattr(native, "compiled", lambda _: None)
            do(*own)
        results.append([value for value in own if isinstance(value, Tensor)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shifted", [False, True])
@each_size
@each_kind
def test_neurons_are_turned(
    monkeypatch: pytest.MonkeyPatch, kind: torch.dtype, texts: int, C: int, n: int, *, shifted: bool
) -> None:
    given = Given(texts, C, n, kind)
    both(monkeypatch, elements.relu_and_turn, given.values(), given.phases(shifted=shifted), given.values())


@each_size
@each_kind
def test_neurons_are_gated(monkeypatch: pytest.MonkeyPatch, kind: torch.dtype, texts: int, C: int, n: int) -> None:
    given = Given(texts, C, n, kind)
    both(monkeypatch, gate, given.values(), given.values())


@pytest.mark.parametrize("masked", [False, True])
@each_size
@each_kind
def test_the_gate_is_undone(
    monkeypatch: pytest.MonkeyPatch, kind: torch.dtype, texts: int, C: int, n: int, *, masked: bool
) -> None:
    given = Given(texts, C, n, kind)
    both(monkeypatch, elements.undo_gate, *(given.values() for _ in range(4)), given.mask() if masked else None)


@pytest.mark.parametrize("shifted", [False, True])
@each_size
@each_kind
def test_the_turn_is_undone(
    monkeypatch: pytest.MonkeyPatch, kind: torch.dtype, texts: int, C: int, n: int, *, shifted: bool
) -> None:
    given = Given(texts, C, n, kind)
    by = given.phases(shifted=shifted)
    both(monkeypatch, elements.undo_turn, given.values(), by, given.values(), given.values().relu())


def test_bfloat16_is_rounded_to_the_nearest_even_number(monkeypatch: pytest.MonkeyPatch) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)  # all 65,536 there are
    for other in (1.0, 1.0078125, 3.0, 1e-38, 1e38):  # products of two are exact in float32, and so are rounded once
        both(monkeypatch, gate, every.view(256, 256), torch.full((256, 256), other, dtype=torch.bfloat16))


@each_kind
def test_what_is_no_number_is_not_hidden(monkeypatch: pytest.MonkeyPatch, kind: torch.dtype) -> None:
    strange = torch.tensor([[torch.nan, 1, torch.inf, -torch.inf, 0, -1]], dtype=kind)
    ones = torch.ones(1, 6, dtype=kind)
    still = Phases(torch.ones(1, 3, dtype=torch.complex64), None)
    both(monkeypatch, gate, strange, ones)
    both(monkeypatch, gate, ones, strange)
    both(monkeypatch, elements.undo_turn, strange, still, ones, ones)
    out = ones.clone()
    elements.relu_and_turn(strange, still, out)
    assert out.isnan()[0].tolist() == [True, True, False, True, False, False]  # infinity, times a sine of zero


# Switched off, no such compiler, one that fails, one that writes nothing.
WITHOUT = {"off": ("BDH_NATIVE", "0"), "absent": ("CC", "no-such-compiler"), "failing": ("CC", "false"), "idle": ("CC", "true")}


@pytest.mark.parametrize(("name", "value"), WITHOUT.values(), ids=WITHOUT)
def test_pytorch_does_it_where_there_is_no_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, value: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(name, value)
    assert native.compiled(torch.float32) is None
    neurons = torch.tensor([[-1.0, 2.0]])
    elements.gate(neurons, torch.tensor([[3.0, 4.0]]))
    assert neurons.tolist() == [[-3.0, 8.0]]


def test_it_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.compiled(torch.float32)
    (kept,) = (path for path in tmp_path.rglob("*") if path.is_file())
    before = kept.stat().st_mtime_ns
    native.compiled.cache_clear()
    assert native.compiled(torch.float32)
    assert kept.stat().st_mtime_ns == before
    assert native.compiled(torch.float64) is None
    assert native.compiled(torch.float16) is None


def test_a_damaged_library_is_compiled_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.compiled(torch.float32)
    (kept,) = (path for path in tmp_path.rglob("*") if path.is_file())
    whole = kept.read_bytes()
    kept.unlink()  # what is loaded stays as it is
    kept.write_bytes(whole[:100])
    native.compiled.cache_clear()
    assert native.compiled(torch.float32)
    assert len(kept.read_bytes()) == len(whole)


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_a_home_that_nobody_can_write_to_and_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert native.compiled(torch.bfloat16)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
    native.compiled.cache_clear()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)  # as for a user whom no system knows
    assert native.compiled(torch.bfloat16)


def test_several_that_compile_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(partial(native._library, "token.c"), [()] * 4))
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1
