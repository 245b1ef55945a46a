"""The page holds what the record says, in one small file."""

import base64
import json
import re
from typing import Any

import numpy as np
import pytest

import bdh_spec
from bdh_conformance import assert_agrees, expect
from bdh_conformance.yardstick.cases import CONFIGS, Case
from bdh_look import LookError, record
from bdh_look.causes import candidates, causes, logits_without
from bdh_look.page import FULL, MAX_BYTES, TOP, glyphs, largest, page, shares_of, side_by_side
from bdh_spec import BDHConfig, Model, RecurrentState
from bdh_spec import model as spec
from bdh_spec.rope import frequencies, rotation

TEXT = b'if "x" is not None:\n    return 1\n\nif "x" is not N\xc3\xa9</script>'
STORED = 2.0**-23  # relative, of a number that is stored as float32
SMALL = BDHConfig(n_layer=2, n_embd=12, n_head=2, mlp_internal_dim_multiplier=4)


@pytest.fixture(scope="module")
def model() -> Model:
    """A small model with large weights, so that bytes differ."""
    params = bdh_spec.init(SMALL, np.random.default_rng(5))
    return bdh_spec.get_backend("numpy").load(bdh_spec.Params(*(20 * w for w in params)), SMALL, dtype="float64")


@pytest.fixture(scope="module")
def html(model: Model) -> str:
    return page(model, TEXT, "a <small> model")


def data_of(html: str) -> dict[str, Any]:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    return json.loads(found)


def array(html: str, name: str) -> np.ndarray:
    return array_of(data_of(html)["arrays"][name])


def array_of(held: dict[str, Any]) -> np.ndarray:
    kinds = {"Uint8": "u1", "Int8": "i1", "Uint16": "<u2", "Int16": "<i2", "Uint32": "<u4", "Float32": "<f4"}
    return np.frombuffer(base64.b64decode(held["base64"]), kinds[held["type"]]).reshape(held["shape"])


def test_the_page_is_one_file_that_names_no_address(html: str) -> None:
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", html)
    assert not re.search(r"<(link|img|script)[^>]*\b(src|href)=\"(?!data:)", html)
    assert "a &lt;small&gt; model" in html
    assert html.count("</script>") == 2  # and none of them is the text's


def test_a_page_about_a_thousand_bytes_of_the_embedded_models_size_is_below_five_megabytes() -> None:
    _, config = bdh_spec.read()
    model = bdh_spec.get_backend("numpy").load(bdh_spec.init(config, np.random.default_rng(0)), config)
    text = bytes(np.random.default_rng(0).integers(32, 127, 250, np.uint8))
    arrays = data_of(page(model, text, with_causes=False))["arrays"] | {"causes": {"shape": [250, TOP["causes"]]}}
    sizes = {
        name: np.prod(held["shape"]) * {"8": 1, "6": 2, "2": 4}[held.get("type", "Float32")[-1]]
        for name, held in arrays.items()
    }
    of_neurons = sum(sizes[name] for name in arrays if arrays[name]["shape"][0] == len(array_of(arrays["met"])))
    # All neurons are met in 1,000 bytes, the map of who read whom grows with the square, and all else with the text.
    whole = config.n_head * config.n_neurons / len(array_of(arrays["met"])) * of_neurons
    rest = sum(sizes.values()) - of_neurons - sizes["everywhere"]
    assert (16 * sizes["everywhere"] + 4 * rest + 3 * 4 * sizes["causes"] + whole) * 4 / 3 + 100_000 < 5e6


def test_what_was_read_and_expected_is_in_the_page(model: Model, html: str) -> None:
    seen = record(model, TEXT)
    assert array(html, "tokens").tobytes() == TEXT
    np.testing.assert_allclose(array(html, "loss")[1:], seen.loss.values[1:], rtol=STORED)
    likeliest = seen.next_byte.values.argmax(-1)
    assert np.array_equal(array(html, "expected")[:, 0], likeliest)
    shares = shares_of(seen.scores.values)
    most = np.abs(shares[:, :, 9]).argmax(-1)
    assert np.array_equal(array(html, "reads")[:, :, 9, 0], most)
    np.testing.assert_allclose(
        np.abs(array(html, "readShares")[:, :, 9, 0]) / FULL, np.abs(shares[:, :, 9]).max(-1), atol=1 / FULL
    )
    everywhere = np.zeros((len(TEXT), len(TEXT)))
    everywhere[np.tril_indices(len(TEXT), -1)] = array(html, "everywhere")
    np.testing.assert_allclose(
        everywhere / 255 * array(html, "everywhereMost")[:, None], np.abs(shares).mean((0, 1)), atol=1 / 255
    )


def test_the_synapses_of_a_byte_are_the_largest_parts_of_what_it_read(model: Model, html: str) -> None:
    seen = record(model, TEXT)
    for time in (1, 7, len(TEXT) - 1):
        before = seen.state_after(time - 1).values
        parts = seen.rotated.values[:, :, time, :, None] * before  # L h N D
        for i, j in np.ndindex(parts.shape[:2]):
            size = np.abs(parts[i, j])
            n, d, writer = array(html, "synapses")[i, j, time, 0]
            assert size[n, d] == pytest.approx(size.max(), rel=STORED)
            share = array(html, "synapseShares")[i, j, time, 0] / FULL
            assert share == pytest.approx(parts[i, j, n, d] / size.sum(), abs=2 / FULL)
            assert array(html, "synapseValues")[i, j, time, 0] == pytest.approx(before[i, j, n, d], rel=STORED)
            wrote = np.abs(seen.rotated.values[i, j, :time, n] * seen.x.values[i, :time, d])
            assert wrote[writer] == pytest.approx(wrote.max(), rel=STORED)


def test_active_neurons_and_what_grew_are_the_largest(model: Model, html: str) -> None:
    seen = record(model, TEXT)
    passed = side_by_side(seen.xy_sparse.values)
    assert np.array_equal(array(html, "neurons")[1, 5, 0], passed[1, 5].argmax())
    assert np.array_equal(array(html, "active")[..., 2], (passed > 0).sum(-1))
    added = side_by_side(seen.rotated.values)[0, 5, :, None] * seen.x.values[0, 5]
    n, d = array(html, "grew")[0, 5, 0]
    assert abs(added[n, d]) == pytest.approx(np.abs(added).max(), rel=STORED)
    assert array(html, "grewBy")[0, 5, 0] == pytest.approx(added[n, d], rel=STORED)
    course, (head, neuron, feature) = array(html, "course")[0, 0], array(html, "followed")[0, 0]
    states = np.array([seen.state_after(t).values[0, head, neuron, feature] for t in range(len(TEXT))])
    np.testing.assert_allclose(course / 127, states / np.abs(states).max(), atol=1 / 127)


def test_partners_are_the_largest_entries_of_encoder_after_decoder(model: Model, html: str) -> None:
    params = model.params()
    centred = params.decoder - params.decoder.mean(-1, keepdims=True)
    graph = centred @ np.concatenate(list(params.encoder), -1)
    for at, neuron in enumerate(array(html, "met")):
        assert graph[neuron, array(html, "excites")[at, 0]] == pytest.approx(graph[neuron].max(), rel=STORED)
        assert graph[array(html, "excitedBy")[at, 0], neuron] == pytest.approx(graph[:, neuron].max(), rel=STORED)


def test_what_is_expected_without_a_byte_is_what_the_protocol_says_of_a_state_without_it() -> None:
    case = Case(CONFIGS["three_heads"], batch=1, time=9, seed=6, scale=20)
    time, turn = case.time - 1, rotation(case.time - 1, 1, frequencies(case.config.n_neurons), np.float32, "exact")
    earlier = np.arange(time)

    def specified(params: bdh_spec.Params) -> dict[str, np.ndarray]:
        empty = spec.init_state(1, case.config, params.embed.dtype)
        _, state = spec.advance(empty, case.tokens[:, :time], params, case.config)
        stages = spec.trace(case.tokens, params, case.config)
        starts = [stages["embed"], *(stages[f"layers.{i}.x"] for i in range(case.config.n_layer - 1))]
        rows = []
        for s in earlier:
            wrote = [stages[f"layers.{i}.rotated"][:, :, s, :, None] * x[:, None, s, None] for i, x in enumerate(starts)]
            layers = tuple(layer - part for layer, part in zip(state.layers, wrote, strict=True))
            left = RecurrentState(time, layers)
            rows.append(spec.advance(left, case.tokens[:, time:], params, case.config)[0][0, 0])
        return {"logits": np.stack(rows)[None]}

    here = bdh_spec.get_backend("numpy").load(case.params, case.config)
    times = np.full(time, time)
    found = logits_without(
        record(here, case.tokens), here.params(), tuple(np.repeat(part, time, 0) for part in turn), times, earlier
    )
    assert_agrees("without", {"logits": found[None]}, expect(specified, case.params, "float32"), str(case))


def test_what_mattered_is_told_for_the_bytes_that_were_read_most(model: Model) -> None:
    seen = record(model, TEXT)
    earlier, gave, left = causes(model, seen, 5)
    assert not gave[0].any()
    assert set(earlier[20]) == set(candidates(seen, 20, 5))
    assert (np.diff(np.abs(gave[20])) <= 0).all()
    before = seen.next_byte.values.max(-1)[1:, None]
    known = np.arange(5) < np.arange(1, len(TEXT))[:, None]
    np.testing.assert_array_equal(np.sign(gave[1:])[known], np.sign(before - left[1:])[known])


def test_the_largest_come_first_and_zeros_fill_up() -> None:
    found, values = largest(np.array([[0.5, -2.0, 1.0]]), 4)
    assert found.tolist() == [[1, 2, 0, 0]]
    assert values.tolist() == [[-2.0, 1.0, 0.5, 0.0]]


def test_bytes_that_are_no_text_can_be_shown() -> None:
    assert glyphs(b"a\xff\xe2\x82\xac\x00") == ["a", "\\xff", "€", "·", "·", "\\x00"]


@pytest.mark.parametrize("text", [b"", b"a", b"a" * (MAX_BYTES + 1)])
def test_a_text_that_is_too_short_or_too_long_for_a_page_is_refused(model: Model, text: bytes) -> None:
    with pytest.raises(LookError, match=f"has {len(text)} bytes: a page shows 2 to 2,000"):
        page(model, text)
