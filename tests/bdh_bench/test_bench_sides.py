"""Every side of every row computes what the specification says, so that what is timed is the model."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bdh_bench import measure_torch, plain_jax
from bdh_bench.reference import reference, worst_error
from bdh_bench.rows import Row
from bdh_bench.sides import AGAIN, BDH_TORCH, COMPILED, OURS, PLAIN, AbsentError, Named, Task, framework, sides_of
from bdh_conformance.yardstick.agreement import assert_agrees
from bdh_conformance.yardstick.tolerances import expect
from bdh_spec import Params
from bdh_spec import model as spec
from bdh_spec.gradients import gradients

pytestmark = pytest.mark.usefixtures("restored")

ROWS = {
    "forward": Row("forward", 2, 9),
    "prefill": Row("prefill", 2, 9),
    "train": Row("train", 2, 9),
    "decode": Row("decode", 2, 9),
}
PORTS = ("numpy", "torch", "jax", "mlx")
# Builds C++ for each row; compiles op by op what is jitted beside it.
SLOW = {("torch", COMPILED, kind) for kind in ROWS} | {("jax", PLAIN, kind) for kind in ROWS if kind != "forward"}
Made = Callable[..., Task]


def by_the_specification(task: Task) -> Callable[[Params], Named]:
    """The answer to a row, in the phases of the plain form."""
    tokens, config = task.tokens(), task.config
    if task.row.kind == "train":
        return lambda p: gradients(tokens, task.targets(), p, config, phase="float32")[1]._asdict()
    if task.row.kind == "decode":
        tokens = np.concatenate([tokens, task.next()], axis=1)
    return lambda p: {"logits": spec.forward(tokens, p, config, phase="float32")}


def agree(task: Task, answer: Named) -> None:
    """Demand what the specification says, of the tokens that the answer is about."""
    expected = expect(by_the_specification(task), task.params(), task.dtype)
    if "logits" in expected:
        length = answer["logits"].shape[1]
        logits = expected["logits"]
        expected["logits"] = replace(logits, reference=logits.reference[:, -length:])
    assert_agrees(f"{task.port} {task.side}", answer, expected, task.row.name)


def everything() -> list[tuple[str, str, str]]:
    tasks = [(port, kind) for port in PORTS for kind in ROWS]
    found = [(p, s, k) for p, k in tasks for s in sides_of(Task(p, OURS, ROWS[k], None, "float32", "cpu"))]  # type: ignore[arg-type]
    return [side for side in found if side not in SLOW]


@pytest.mark.parametrize(("port", "side", "kind"), everything())
def test_a_side_answers_what_the_specification_says_and_runs(task: Made, port: str, side: str, kind: str) -> None:
    asked = task(port, side, ROWS[kind])
    if (port, kind, side) == ("numpy", "train", PLAIN) or (port, side) == ("mlx", COMPILED):
        with pytest.raises(AbsentError):
            framework(port, "cpu").runner(asked, asked.params())
        return
    if (port, kind) == ("jax", "train"):  # whose compilation takes most of the time of these tests
        asked = replace(asked, config=replace(asked.config, n_layer=1))
    runner = framework(port, "cpu").runner(asked, asked.params())
    agree(asked, runner.answer())
    runner.run()
    runner.run()  # a second run goes on from the first


def test_the_plain_form_in_pytorch_can_be_compiled(task: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    # Traced as for the real compiler, which takes a quarter of a minute to build it.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    asked = task("torch", COMPILED, ROWS["forward"])
    agree(asked, framework("torch", "cpu").runner(asked, asked.params()).answer())


def test_no_compiler_is_a_sentence(task: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    asked = task("torch", COMPILED, ROWS["forward"])
    with pytest.raises(AbsentError, match=r"needs a C\+\+ compiler, and no-such-compiler is not here"):
        framework("torch", "cpu").runner(asked, asked.params())


@pytest.mark.parametrize(
    ("port", "side"), [("torch", OURS), ("torch", PLAIN), ("jax", COMPILED), ("mlx", OURS), ("mlx", PLAIN)]
)
def test_narrow_weights_are_near_the_specification(task: Made, port: str, side: str) -> None:
    asked = task(port, side, ROWS["forward"], dtype="bfloat16")
    found = framework(port, "cpu").runner(asked, asked.params()).answer()
    assert 1e-4 < worst_error(found, reference(asked)) < 0.2  # rounded to 8 bits, and not computed in more


def plain_of(port: str) -> ModuleType:
    return importlib.import_module(f"bdh_bench.plain_{port}")


@pytest.mark.parametrize("port", PORTS)
def test_a_planted_error_in_a_plain_form_is_caught(task: Made, port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, asked = plain_of(port), task(port, PLAIN, ROWS["forward"])
    right = module.attend
    # The present token is seen as well.
    monkeypatch.setattr(module, "attend", lambda rotated, v: right(rotated, v) + (rotated * rotated).sum(-1)[..., None] * v)
    answer = framework(port, "cpu").runner(asked, asked.params()).answer()
    with pytest.raises(AssertionError, match="differs from the specification"):
        agree(asked, answer)


@pytest.mark.parametrize("port", PORTS)
def test_a_state_may_stand_far_away(task: Made, port: str) -> None:
    asked = task(port, OURS, Row("decode", 1, 100_000))
    found = framework(port, "cpu").runner(asked, asked.params()).answer()
    assert worst_error(found, reference(asked)) < 1e-4


@pytest.mark.parametrize("port", ["torch", "mlx"])
@pytest.mark.parametrize("side", [OURS, PLAIN])
def test_dropout_is_in_steps_and_not_in_slopes(task: Made, port: str, side: str) -> None:
    asked = task(port, side, ROWS["train"])
    dropping = replace(asked, config=replace(asked.config, dropout=0.5))
    runner = framework(port, "cpu").runner(dropping, dropping.params())
    agree(asked, runner.answer())
    runner.run()


def test_the_plain_form_in_jax_drops(task: Made) -> None:
    params = Params(*map(jnp.asarray, task("jax", PLAIN, ROWS["train"]).params()))
    layer = jax.jit(lambda x, key: plain_jax.layer(x, plain_jax.attend, params, jnp.uint32(0), 0.5, key))
    found = [layer(jnp.ones((1, 4, 8)), jax.random.key(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


def test_the_sides_of_a_row() -> None:
    def sides(port: str, kind: str) -> tuple[str, ...]:
        return sides_of(Task(port, OURS, ROWS[kind], None, "float32", "cpu"))  # type: ignore[arg-type]

    assert sides("torch", "forward") == (OURS, PLAIN, COMPILED)
    assert sides("mlx", "decode") == sides("torch", "decode") == (OURS, PLAIN, AGAIN, COMPILED)
    assert sides("jax", "decode") == (OURS, PLAIN, COMPILED)
    assert sides("numpy", "forward") == sides("somebody.else:Port", "forward") == (OURS, PLAIN)


def test_an_error_is_that_of_the_worst_token() -> None:
    expected = np.ones((1, 3, 4))
    answer = expected.copy()
    answer[0, 1] *= 1.5
    assert worst_error({"logits": answer}, {"logits": expected}) == pytest.approx(0.5)
    assert worst_error({"logits": answer[:, -1:]}, {"logits": expected}) == 0
    assert worst_error({"encoder": answer}, {"encoder": expected}) == pytest.approx(0.5 / np.sqrt(3))
    answer[0, 0, 0] = np.nan
    assert worst_error({"logits": answer}, {"logits": expected}) == np.inf


def test_transformers_writes_what_bdh_torch_writes(task: Made) -> None:
    ours, theirs = (task("torch", side, Row("transformers", 1, 32, "8")) for side in (OURS, BDH_TORCH))
    texts = [measure_torch.Torch("cpu").runner(t, t.params()).answer()["text"] for t in (ours, theirs)]
    assert texts[0].shape == (1, 33)
    np.testing.assert_array_equal(*texts)
