"""The port in JavaScript, judged by the vectors in node; its texts, states and refusals are held against the specification."""

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import bdh_spec
from bdh_conformance import assert_agrees, expect
from bdh_conformance.files import vectors
from bdh_conformance.files.check import DIFFERS, check
from bdh_conformance.files.cli import vectors as command
from bdh_conformance.yardstick.reference import Specification
from bdh_look.hubs import hubs
from bdh_look.live import JAVASCRIPT
from bdh_spec import BDHConfig, Frequencies, Params
from bdh_spec.checkpoint import EMBEDDED, metadata, read_state, save_state
from bdh_spec.files import write_safetensors
from bdh_spec.model import RecurrentState, layer_norm, log_softmax
from bdh_spec.params import cast, fingerprint
from bdh_spec.rope import frequencies

TEXT = "one two one two: \u00e9 \U0001f409 one two"
Ask = Callable[..., bytes]
Refusal = Callable[..., str]

# A module, what is changed in it, to what, and the case and the tensor at which the report must then begin.
MISTAKES = {
    "the write before the read": (
        "decode",
        "attention[d] += q0 * held0 + q1 * held1;",
        "attention[d] += q0 * (held0 + q0 * x[d]) + q1 * (held1 + q1 * x[d]);",
        ("first_steps", "decode.0.logits"),
    ),
    "a carry that is lost": (
        "rope",
        "step.high[n] + (low[n] < step.low[n] ? 1 : 0)",
        "step.high[n]",
        None,  # the low half is 2^-32 of a turn: see test_a_lost_carry_is_found
    ),
    "phases of float32": (
        "rope",
        'this.phase === "exact" ? high',
        "position < 0n ? high",
        ("first_steps", "phases.cos"),
    ),
    "eps": (
        "model",
        "EPS = 1e-5",
        "EPS = 1e-6",
        ("first_steps", "embed"),
    ),
    "the counter": (
        "sampling",
        "philox([1n, 0n,",
        "philox([0n, 0n,",
        ("first_steps", "sampling.uniforms"),
    ),
    "a pair that is half silent": (
        "decode",
        "if (a === 0 && b === 0) {",
        "if (a === 0 || b === 0) {",
        ("first_steps", "decode.0.logits"),
    ),
}


# Enough to show each mistake, and quickly judged.
SHOWN_BY = ("first_steps", "fresh_weights", "three_heads")


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("javascript") / "vectors"
    vectors.export(folder)
    return folder


@pytest.fixture(scope="session")
def few(exported: Path) -> Path:
    """Some of the cases."""
    for name in SHOWN_BY:
        shutil.copytree(exported / name, exported.parent / "few" / name)
    return exported.parent / "few"


def computed(node: str, folder: Path, cases: Path, outputs: Path, dtype: str = "float32") -> Path:
    """What the port in a folder computes of these cases."""
    subprocess.run([node, folder / "vectors_cli.mjs", cases, outputs, dtype], check=True)
    return outputs


def test_node_computes_every_tensor_but_the_gradients_of_every_case(node: str, exported: Path, tmp_path: Path) -> None:
    outputs = computed(node, JAVASCRIPT, exported, tmp_path / "outputs")
    result = CliRunner().invoke(command, ["check", str(exported), str(outputs)])
    assert result.exit_code == 0, result.stdout
    *cases, sum_of_all = result.stdout.splitlines()
    cases_of_all = len(vectors.case_folders(exported))
    assert sum_of_all.endswith(f"tensors agree, 0 differ, {5 * cases_of_all} are not claimed")
    assert all("gradients.embed, gradients.encoder, " in line for line in cases if "not claimed" in line)


def test_in_float64_it_is_as_near_as_that(node: str, few: Path, tmp_path: Path) -> None:
    outputs = computed(node, JAVASCRIPT, few, tmp_path / "outputs", "float64")
    for report in check(few, outputs):
        assert not report.having(DIFFERS)
        assert {verdict.dtype for verdict in report.verdicts if verdict.name == "logits"} == {"float64"}


@pytest.mark.parametrize("mistake", [name for name, (*_, found_at) in MISTAKES.items() if found_at])
def test_a_broken_twin_is_caught_where_it_was_broken(node: str, few: Path, tmp_path: Path, mistake: str) -> None:
    module, before, after, found_at = MISTAKES[mistake]
    outputs = computed(node, twin(tmp_path / "twin", module, before, after), few, tmp_path / "outputs")
    reports = check(few, outputs)
    assert (reports[0].case, reports[-1].case) == ("first_steps", "three_heads")
    assert next((report.case, wrong[0].name) for report in reports if (wrong := report.having(DIFFERS))) == found_at


def test_a_lost_carry_is_found(ask: Ask, small: tuple[Params, BDHConfig], tmp_path: Path) -> None:
    """It moves a phase by 2^-32 of a turn for each position, which no vector is long enough to show: exact phases do."""
    assert b"true" in ask("turns", 16, 3000)
    module, before, after, _ = MISTAKES["a carry that is lost"]
    assert b"false" in ask("turns", 16, 3000, folder=twin(tmp_path / "twin", module, before, after))


def twin(folder: Path, module: str, before: str, after: str) -> Path:
    """The port with one line changed."""
    shutil.copytree(JAVASCRIPT, folder)
    source = (folder / f"{module}.mjs").read_text()
    assert source.count(before) == 1
    (folder / f"{module}.mjs").write_text(source.replace(before, after))
    return folder


def test_r4_the_table_is_the_specification_s_to_the_bit(ask: Ask) -> None:
    sizes = [2, 4, 6, 10, 30, 512, 682, 1000, 4096, 8192, 32768]
    assert ask("frequencies", *sizes) == b"".join(frequencies(N).tobytes() for N in sizes)


@pytest.mark.parametrize(("temperature", "top_k", "seed"), [(0.7, 50, 7), (0.0, 0, 0), (1.0, 0, 2**63 + 9)])
def test_r14_one_seed_gives_the_specification_s_text(ask: Ask, temperature: float, top_k: int, seed: int) -> None:
    wanted = bdh_spec.load(backend="numpy").generate("The ", 60, temperature, top_k, seed)
    assert ask("generate", EMBEDDED, "The ", 60, temperature, top_k, seed) == wanted


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "float64", "frequencies of its own", "the table stored"])
def test_a_canonical_file_of_any_type_is_the_model_it_holds(
    ask: Ask, small: tuple[Params, BDHConfig], tmp_path: Path, kind: str
) -> None:
    params, config = small
    path = tmp_path / "m.safetensors"
    if kind == "frequencies of its own":
        turned = np.random.default_rng(3).normal(0, 0.3, config.n_neurons).astype(np.float32)  # backwards too, and no pairs
        config = replace(config, freqs=Frequencies(turned))
    if kind == "the table stored":
        stored = {**params._asdict(), "freqs": frequencies(config.n_neurons)}
        write_safetensors(path, stored, metadata(config))
    else:
        bdh_spec.save(path, cast(params, kind) if "float" in kind else params, config)
    params, config = bdh_spec.read(path)
    model = bdh_spec.load(path, backend="numpy")
    assert ask("fingerprint", path).decode() == fingerprint(params, config.freqs)
    assert ask("generate", path, TEXT, 40, 1.0, 0, 3) == model.generate(TEXT, 40, 1.0, 0, 3)


def test_r13_states_move_from_the_page_to_python_and_back(
    ask: Ask, refusal: Refusal, small: tuple[Params, BDHConfig], tmp_path: Path
) -> None:
    params, config = small
    bdh_spec.save(tmp_path / "m.safetensors", params, config)
    model, of_model = bdh_spec.load(tmp_path / "m.safetensors", backend="numpy"), fingerprint(params)
    whole = model.generate(TEXT, 30, seed=5)[len(TEXT.encode()) :]

    ask("save", tmp_path / "m.safetensors", TEXT, tmp_path / "theirs.safetensors")
    saved, pending = read_state(tmp_path / "theirs.safetensors", config, of_model)
    assert saved.position == len(TEXT.encode()) - 1
    stream = model.stream(pending, 30, seed=5, state=model.import_state(saved))
    assert bytes(int(token[0]) for token, _ in stream) == whole

    tokens = np.frombuffer(TEXT.encode(), np.uint8).astype(np.int64)[None]
    _, state = model.advance(model.init_state(), tokens[:, :-1])
    ours = model.export_state(state)
    save_state(tmp_path / "ours.safetensors", ours, config, of_model, tokens[:, -1:])
    assert ask("go_on", tmp_path / "m.safetensors", tmp_path / "ours.safetensors", 30, 5) == whole

    save_state(tmp_path / "ours.safetensors", ours, config, "0" * 64, tokens[:, -1:])
    sentence = refusal("go_on", tmp_path / "m.safetensors", tmp_path / "ours.safetensors", 30, 5)
    assert "is a state of model 000000000000, this is model" in sentence
    assert "it is a saved state" in refusal("open", tmp_path / "ours.safetensors")


def test_what_the_page_shows_is_what_the_specification_computes(
    ask: Ask, small: tuple[Params, BDHConfig], tmp_path: Path
) -> None:
    params, config = small
    bdh_spec.save(tmp_path / "m.safetensors", params, config)
    tokens = np.frombuffer(TEXT.encode(), np.uint8).astype(np.int64)[None]
    shown, last = json.loads(ask("read", tmp_path / "m.safetensors", TEXT)), config.n_layer - 1

    def wanted(weights: Params) -> dict[str, np.ndarray]:
        """Bits of each byte; of the last one its scores in each layer; what each byte wrote to head 0, neuron 3, feature 1."""
        model = Specification(weights, config)
        stages, bits = model.trace(tokens), []
        for t in range(1, tokens.size):
            of_one = np.full_like(tokens, -100)
            of_one[0, t - 1] = tokens[0, t]
            bits.append(model.loss(tokens, of_one) / np.log(2))
        scores = {f"scores.{i}": stages[f"layers.{i}.scores"][0, :, -1, :-1] for i in range(config.n_layer)}
        wrote = stages[f"layers.{last}.rotated"][0, 0, :, 3] * stages[f"layers.{last - 1}.x"][0, :, 1]
        return {"bits": np.array(bits), **scores, "written": wrote}

    found = {"bits": shown["bits"][1:], "written": shown["written"]}
    found |= {f"scores.{i}": shown["scores"][i] for i in range(config.n_layer)}
    expected = expect(wanted, params, "float32")
    assert shown["bits"][0] is None
    assert_agrees("the page", {name: np.array(found[name], np.float32) for name in expected}, expected)
    stages = Specification(params, config).trace(tokens)
    for i in range(config.n_layer):
        for name, fired in zip(("x_sparse", "xy_sparse"), shown["fired"][i], strict=True):
            active = stages[f"layers.{i}.{name}"][0, :, -1].reshape(-1)
            assert set(np.flatnonzero(active > 1e-3 * active.max())) <= set(fired)
            assert len(fired) <= np.count_nonzero(active) + 2


@pytest.mark.parametrize("t", [1, 20, len(TEXT.encode()) - 1])
def test_what_a_prediction_came_from_is_what_the_specification_computes(
    ask: Ask, small: tuple[Params, BDHConfig], tmp_path: Path, t: int
) -> None:
    params, config = small
    bdh_spec.save(tmp_path / "m.safetensors", params, config)
    found = json.loads(ask("causes", tmp_path / "m.safetensors", TEXT, t))
    tokens = np.frombuffer(TEXT.encode(), np.uint8).astype(np.int64)[None, : t + 1]
    tried = np.array([one["at"] for one in found["found"]])
    h, D, N = params.encoder.shape

    def wanted(weights: Params) -> dict[str, np.ndarray]:
        """The chances without each, and what each entry of the state gave to what was read, by a state that we take apart."""
        model = Specification(weights, config)
        stages = model.trace(tokens)
        inputs = [stages["embed"], *(stages[f"layers.{i}.x"] for i in range(config.n_layer - 1))]
        q = [stages[f"layers.{i}.rotated"][0] for i in range(config.n_layer)]
        _, state = model.advance(model.init_state(), tokens[:, :t])
        held = model.export_state(state)
        left = []
        for u in tried:
            layers = [S - q[i][:, u, :, None] * inputs[i][0, u] for i, S in enumerate(held.layers)]
            without = model.import_state(RecurrentState(held.position, tuple(layers)))
            logits = model.advance(without, tokens[:, t:])[0][0, -1]
            left.append(np.exp(log_softmax(logits)[found["likeliest"]]))
        parts = [np.abs(q[i][:, t, :, None] * S[0]) for i, S in enumerate(held.layers)]
        shares = [part / part.sum((1, 2), keepdims=True) for part in parts]
        return {"left": np.array(left), "parts": np.array(shares).reshape(config.n_layer, h * N, D)}

    assert len(tried) == len(set(tried)) == min(t, 12)
    expected = expect(wanted, params, "float32")
    parts = np.array(found["parts"], np.float32).reshape(config.n_layer, h * N, D)
    shown = {"left": np.array([one["left"] for one in found["found"]], np.float32), "parts": parts}
    assert_agrees("the page", shown, expected)
    sizes = [abs(one["gave"]) for one in found["found"]]
    assert sizes == sorted(sizes, reverse=True)
    for one in found["found"]:
        assert one["gave"] == pytest.approx(np.log(found["chance"] / one["left"]))


def test_what_a_neuron_says_and_whom_it_knows_is_in_the_weights(
    ask: Ask, small: tuple[Params, BDHConfig], tmp_path: Path
) -> None:
    params = cast(small[0], "float64")
    bdh_spec.save(tmp_path / "m.safetensors", *small)
    row = 70
    found = json.loads(ask("neuron", tmp_path / "m.safetensors", row, TEXT))
    towards = layer_norm(params.decoder[row]) @ params.lm_head
    assert sorted(found["speaks"]) == sorted(set(TEXT.encode()))
    assert list(np.argsort(-towards[found["speaks"]], kind="stable")) == list(range(len(found["speaks"])))
    whole = (params.decoder - params.decoder.mean(-1, keepdims=True)) @ np.concatenate(list(params.encoder), -1)
    assert found["excites"] == list(np.argsort(-whole[row])[:6])
    assert found["excited_by"] == list(np.argsort(-whole[:, row])[:6])


def test_it_writes_a_hundred_bytes_and_more_for_each_second_of_a_processor(ask: Ask) -> None:
    assert float(ask("speed", EMBEDDED, 300)) > 100


@pytest.mark.parametrize("kind", ["Gx", "Gy"])
@pytest.mark.parametrize("which", ["small", "embedded"])
def test_hubs_are_those_of_the_matrices_for_the_page_and_for_the_command(
    ask: Ask, small: tuple[Params, BDHConfig], tmp_path: Path, kind: str, which: str
) -> None:
    params, config = small if which == "small" else bdh_spec.read()
    bdh_spec.save(tmp_path / "m.safetensors", params, config)
    exact = cast(params, "float64")
    towards = np.concatenate(list(exact.encoder if kind == "Gx" else exact.encoder_v), -1)
    centred = exact.decoder - exact.decoder.mean(-1, keepdims=True)
    whole = centred @ towards
    # What a sum of D float32 products may be off by, whoever adds: no edge is asked about that lies nearer to the threshold.
    rounding = 2.0**-23 * config.n_embd * np.linalg.norm(centred, axis=1)[:, None] * np.linalg.norm(towards, axis=0)
    page, ours = json.loads(ask("hubs", tmp_path / "m.safetensors", kind)), hubs(params, config)[kind]
    for found in (page, ours):
        threshold, out, into = found["threshold"], np.array(found["out"], int), np.array(found["into"], int)
        unsure = np.abs(whole - threshold) <= rounding
        for degrees, axis in ((out, 1), (into, 0)):
            assert np.all(np.abs((whole > threshold).sum(axis) - degrees) <= unsure.sum(axis))
        assert unsure.sum() <= 1 + len(whole) // 100
        assert found["edges"] == out.sum() == into.sum() == pytest.approx(8 * len(whole), rel=0.1)
        drawn, links = np.array(found["drawn"], int), np.array(found["links"], int).reshape(-1, 2)
        assert len(set(drawn)) == len(drawn)
        assert list(drawn[:12]) == list(np.argsort(-(out + into), kind="stable")[:12])
        for hub in drawn[:12]:
            either = np.maximum(whole[hub], whole[:, hub])
            either[hub] = 0
            partners = np.flatnonzero(either > max(threshold, np.sort(either)[-12] + rounding.max()))
            assert set(partners) <= set(drawn)
        assert np.all(links[:, 0] != links[:, 1])
        assert np.all(np.abs(whole[drawn[links[:, 0]], drawn[links[:, 1]]] - found["weights"]) <= rounding.max())
        assert list(found["weights"]) == sorted(found["weights"], reverse=True)
        for way, edges in (("out", 8), ("into", 8), ("both", 16)):
            neurons = np.array(found["chance"][way], int)
            assert neurons.sum() == len(whole)
            assert np.arange(len(neurons)) @ neurons == pytest.approx(edges * len(whole), rel=0.1)
    assert page["threshold"] == pytest.approx(ours["threshold"], abs=rounding.max())


@pytest.mark.parametrize("length", [0, 7, 16, 31])
def test_a_text_that_was_changed_is_read_as_if_it_had_always_been_so(
    ask: Ask, small: tuple[Params, BDHConfig], tmp_path: Path, length: int
) -> None:
    bdh_spec.save(tmp_path / "m.safetensors", *small)
    assert json.loads(ask("rewind", tmp_path / "m.safetensors", TEXT, length)) == [True, True]


@pytest.mark.parametrize(
    ("data", "characters"),
    [
        ("aé\u20ac\U0001f409\n\t".encode(), 6),
        (bytes(range(256)), 256),
        (b"\xed\xa0\x80\xc0\xaf\xf5\x80\x80\x80\xe2\x82", 11),  # a surrogate, a longer form than need be, too high, cut
        ("\uf7a0\ufeff".encode(), 4),  # of the private use area, which stands for bytes; and a mark that is kept
        (np.random.default_rng(1).integers(0xA0, 256, 500).astype(np.uint8).tobytes(), None),
    ],
)
def test_bytes_of_any_kind_are_characters_and_the_same_bytes_again(ask: Ask, data: bytes, characters: int | None) -> None:
    again, count, size = json.loads(ask("characters", data.hex()))
    assert bytes.fromhex(again) == data
    assert size == len(data)
    assert characters in (None, count)


def files(folder: Path, params: Params, config: BDHConfig) -> dict[str, tuple[bytes, str]]:
    """Files that are no canonical checkpoint, and what is said of them."""
    bdh_spec.save(folder / "m.safetensors", params, config)
    whole = (folder / "m.safetensors").read_bytes()

    def written(tensors: dict[str, np.ndarray], about: dict[str, str]) -> bytes:
        write_safetensors(folder / "other.safetensors", tensors, about)
        return (folder / "other.safetensors").read_bytes()

    weights, about = params._asdict(), metadata(config)
    of_torch = {"embed.weight": params.embed, "attn.freqs": frequencies(config.n_neurons)}
    another = dict(about, config=json.dumps(config.as_dict() | {"n_layer": None}))
    return {
        "empty": (b"", "is empty: copy or download it again"),
        "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "is a git-LFS pointer"),
        "zip": (b"PK\x03\x04" + bytes(40), "is a zip file, as .pt and .npz are: convert it with bdh-convert --to numpy"),
        "pickle": (b"\x80\x02}q\x00.", "is a pickle, which nobody should open"),
        "text": (b"once upon a time there was", "is no whole safetensors file (it does not begin with its header)"),
        "cut": (whole[:-9], "is no whole safetensors file ("),
        "longer": (whole + b"12345678", "bytes of data where its tensors have"),
        "no json": (b"\x02" + bytes(7) + b"{]", "its header is no JSON"),
        "dialect": (written(of_torch, {}), "another dialect: convert it with bdh-convert --to numpy"),
        "nobody's": (written({"wte": params.embed}, {}), "has format undefined, wanted"),
        "future": (written(weights, dict(about, spec_version="2.0")), "follows specification 2.0, this is 1.0"),
        "sizes": (written(weights, another), "n_layer is null: it must be a whole number of at least 1"),
        "shape": (
            written(weights | {"lm_head": params.lm_head.T.copy()}, about),
            "lm_head has shape (256, 22), config asks for",
        ),
        "whole numbers": (written(weights | {"embed": params.embed.astype(np.int32)}, about), "holds embed as I32"),
        "missing": (
            written({"embed": params.embed}, about),
            "a canonical file holds embed, encoder, encoder_v, decoder, lm_head",
        ),
        "infinite": (
            written(weights | {"freqs": np.full(config.n_neurons, np.inf, np.float32)}, about),
            "frequency 0 is Infinity",
        ),
    }


def test_whatever_is_no_checkpoint_gets_one_sentence(ask: Ask, small: tuple[Params, BDHConfig], tmp_path: Path) -> None:
    given = files(tmp_path, *small)
    for name, (data, _) in given.items():
        (tmp_path / f"{name}.given").write_bytes(data)
    found = json.loads(ask("refusals", *(tmp_path / f"{name}.given" for name in given)))
    for (name, (_, sentence)), told in zip(given.items(), found, strict=True):
        assert sentence in told, f"{name}: {told}"
        assert len(told) < 400
        assert told.isprintable()


def test_a_mutated_file_gets_one_sentence_or_is_read(ask: Ask, small: tuple[Params, BDHConfig], tmp_path: Path) -> None:
    bdh_spec.save(tmp_path / "m.safetensors", *small)
    ask("save", tmp_path / "m.safetensors", TEXT, tmp_path / "s.safetensors")
    assert ask("mutated", tmp_path / "m.safetensors", tmp_path / "s.safetensors", 400).decode() == ""


@pytest.mark.parametrize(
    ("prompt", "how", "sentence"),
    [
        ("", (3, 1, 0, 0), "the prompt is empty: a text begins with at least one byte"),
        ("a", (-3, 1, 0, 0), "max_new_tokens is -3: a text cannot shrink"),
        ("a", (3, -1, 0, 0), "temperature is -1: it must be a finite number"),
        ("a", (3, 1, -2, 0), "top_k is -2: keep 1 or more tokens"),
        ("a", (3, 1, 0, 2**64), f"seed is {2**64}: it must be a whole number from 0 to 2^64 - 1"),
    ],
)
def test_a_text_that_cannot_be_is_refused(refusal: Refusal, prompt: str, how: tuple[float, ...], sentence: str) -> None:
    assert sentence in refusal("generate", EMBEDDED, prompt, *how)
