"""Byte b is token b, in every text and on every machine; special tokens are those that a tokenizer was given on purpose."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    DataCollatorForLanguageModeling,
    TextIteratorStreamer,
    TokenizersBackend,
    pipeline,
)

from bdh_conformance.yardstick.cases import Case
from bdh_convert.convert import Settings, convert
from bdh_spec.config import BDHConfig as Sizes
from bdh_transformers import BDHConfig, BDHForCausalLM, BDHTokenizer
from bdh_transformers.tokenization_bdh import alphabet

TOKENIZER = BDHTokenizer()
SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>", "extra_special_tokens": ["<x>", "<y>"]}
# A NUL, the character that byte-level BPE writes a NUL as, a composed and a decomposed letter, an emoji of several characters.
HARD = "\0 Ā Ġ é e\u0301 🧑\u200d🚀 龍 \ufeff\r\n\t ,. <pad> </s> \U0010ffff"


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def test_the_alphabet_is_that_of_byte_level_bpe() -> None:
    assert set(alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(alphabet().values()) == list(range(256))


@given(st.text())
def test_a_text_is_its_bytes_and_comes_back(text: str) -> None:
    assert bytes(ids_of(text)) == text.encode()
    assert TOKENIZER.decode(ids_of(text)) == text


def test_every_character_of_every_plane_survives() -> None:
    characters = [chr(code) for code in (*range(0x3000), *range(0x3000, 0xD800, 7), *range(0xE000, 0x110000, 31))]
    text = HARD + "".join(characters)
    assert bytes(ids_of(text)) == text.encode()
    assert TOKENIZER.decode(ids_of(text)) == text
    assert TOKENIZER.convert_tokens_to_string(TOKENIZER.tokenize(text)) == text


@given(st.binary())
def test_any_bytes_decode_as_python_replaces_what_is_no_utf8(data: bytes) -> None:
    assert TOKENIZER.decode(list(data)) == data.decode("utf-8", "replace")


def test_cut_characters_decode_as_python_replaces_them() -> None:
    draw = random.Random(5)
    starts_and_ends = [0x41, 0x80, 0xA0, 0xBF, 0xC2, 0xE0, 0xE4, 0xED, 0xF0, 0x90, 0x9F, 0xF4, 0xFF]
    for _ in range(3000):
        data = bytes(draw.choices(starts_and_ends, k=draw.randrange(1, 9)))
        assert TOKENIZER.decode(list(data)) == data.decode("utf-8", "replace"), data


def test_a_megabyte_without_a_space_takes_seconds() -> None:
    text = "é" * 500_000
    started = time.monotonic()
    assert bytes(ids_of(text)) == text.encode()
    assert TOKENIZER.decode(ids_of(text)) == text
    assert time.monotonic() - started < 30


def test_spaces_are_not_cleaned_up() -> None:
    text = " a , b . do n't  "
    assert TOKENIZER.decode(ids_of(text)) == TOKENIZER.batch_decode([ids_of(text)])[0] == text


def test_special_tokens_come_after_the_bytes() -> None:
    assert (TOKENIZER.pad_token_id, len(TOKENIZER), TOKENIZER.vocab_size) == (256, 257, 256)
    assert len(BDHTokenizer(pad_token=None)) == 256
    assert BDHTokenizer(eos_token="<eos>").get_added_vocab() == {"<eos>": 256, "<pad>": 257}
    expected = {"<bos>": 256, "<eos>": 257, "<pad>": 258, "<x>": 259, "<y>": 260}
    assert BDHTokenizer(**SPECIAL).get_added_vocab() == expected


def test_special_tokens_that_were_given_are_read_where_a_text_spells_them() -> None:
    assert BDHTokenizer(eos_token="<eos>")("é<eos>")["input_ids"] == [195, 169, 256]
    given_special = BDHTokenizer(**SPECIAL)
    assert given_special("a<pad><eos><x>b<y")["input_ids"] == [97, 258, 257, 259, 98, 60, 121]
    assert given_special.tokenize("a<eos>") == ["a", "<eos>"]


def test_what_a_text_spells_is_its_bytes_where_nothing_was_given_or_bytes_are_asked_for() -> None:
    text = "a<pad><eos><x>b"
    assert bytes(TOKENIZER(text)["input_ids"]) == text.encode()
    assert TOKENIZER(text, split_special_tokens=False)["input_ids"][:2] == [97, 256]
    assert bytes(TOKENIZER(text)["input_ids"]) == text.encode()  # asking for it once is not asking for it from then on
    assert bytes(BDHTokenizer(**SPECIAL)(text, split_special_tokens=True)["input_ids"]) == text.encode()
    split = BDHTokenizer(**SPECIAL, split_special_tokens=True)
    assert bytes(split(text)["input_ids"]) == text.encode()
    assert split.tokenize(text) == list(text)


def test_libraries_find_an_end_also_where_none_was_given() -> None:
    """TRL appends ``eos_token`` as text; lm-evaluation-harness decodes ``eos_token_id``."""
    assert (TOKENIZER.eos_token, TOKENIZER.eos_token_id) == ("<pad>", 256)
    assert not "a".endswith(TOKENIZER.eos_token)
    assert TOKENIZER.decode([TOKENIZER.eos_token_id]) == "<pad>"
    assert BDHTokenizer(pad_token=None).eos_token is None


MESSAGES = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "what hatches?"},
    {"role": "assistant", "content": "a dragon"},
    {"role": "user", "content": "🐉?"},
]


@pytest.mark.parametrize("options", [{}, {"eos_token": "<eos>"}, SPECIAL], ids=str)
def test_a_conversation_is_spelled_in_bytes_and_an_answer_ends_with_eos(options: dict[str, object], tmp_path: Path) -> None:
    tokenizer = BDHTokenizer(**options)
    end = tokenizer.eos_token if options else ""
    said = f"System: be kind\n\nUser: what hatches?\n\nAssistant: a dragon{end}\n\nUser: 🐉?\n\n"
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == said
    asked = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    assert asked == tokenizer(said + "Assistant: ")["input_ids"]
    marked = tokenizer.apply_chat_template(MESSAGES, return_assistant_tokens_mask=True)
    answer = [token for token, is_marked in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if is_marked]
    assert answer == [*b"a dragon", *([tokenizer.eos_token_id] if options else [])]
    tokenizer.save_pretrained(tmp_path)
    for kind in (AutoTokenizer, TokenizersBackend):
        assert kind.from_pretrained(tmp_path).apply_chat_template(MESSAGES, tokenize=False) == said


def test_a_template_of_ones_own_is_kept(tmp_path: Path) -> None:
    BDHTokenizer(chat_template="{{ messages[0]['content'] }}").save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(MESSAGES, tokenize=False) == "be kind"


def test_special_tokens_are_skipped_at_will() -> None:
    tokenizer = BDHTokenizer(**SPECIAL)
    assert tokenizer.decode([256, 97, 257, 258]) == "<bos>a<eos><pad>"
    assert tokenizer.decode([256, 97, 257, 258], skip_special_tokens=True) == "a"


def test_an_end_can_be_written_after_every_text(tmp_path: Path) -> None:
    BDHTokenizer(eos_token="<eos>", add_eos_token=True).save_pretrained(tmp_path)
    for kind in (BDHTokenizer, TokenizersBackend):
        assert kind.from_pretrained(tmp_path)("ab")["input_ids"] == [97, 98, 256]


def test_texts_of_different_length_are_padded_on_the_left() -> None:
    batch = TOKENIZER(["a", "bcd"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[256, 256, 97], [98, 99, 100]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]


def test_a_language_model_learns_nul_and_no_padding() -> None:
    collate = DataCollatorForLanguageModeling(TOKENIZER, mlm=False)
    batch = collate([TOKENIZER("\0a"), TOKENIZER("b")])
    assert batch["labels"].tolist() == [[0, 97], [-100, 98]]


@pytest.mark.parametrize("options", [{}, SPECIAL, {"pad_token": None, "padding_side": "right"}], ids=str)
@pytest.mark.parametrize("with_config", [False, True], ids=["tokenizer alone", "with a model"])
def test_auto_tokenizer_loads_what_was_saved(with_config: bool, options: dict[str, object], tmp_path: Path) -> None:
    original = BDHTokenizer(**options)
    original.save_pretrained(tmp_path)
    if with_config:
        BDHConfig().save_pretrained(tmp_path)
    for again in (AutoTokenizer.from_pretrained(tmp_path), TokenizersBackend.from_pretrained(tmp_path)):
        assert again.get_vocab() == original.get_vocab()
        assert again(HARD + "<x>") == original(HARD + "<x>")
        assert again.decode(ids_of(HARD)) == HARD
        assert again.special_tokens_map == original.special_tokens_map
        assert (again.padding_side, again.model_input_names) == (original.padding_side, ["input_ids", "attention_mask"])
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is BDHTokenizer


def test_tokens_added_later_keep_their_ids(tmp_path: Path) -> None:
    tokenizer = BDHTokenizer()
    tokenizer.add_special_tokens({"eos_token": "<eos>", "extra_special_tokens": ["<x>"]})
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_added_vocab() == tokenizer.get_added_vocab() == {"<pad>": 256, "<eos>": 257, "<x>": 258}
    assert again("a<eos><x>")["input_ids"] == tokenizer("a<eos><x>")["input_ids"] == [97, 257, 258]


def test_a_folder_without_a_tokenizer_is_of_bytes(tmp_path: Path) -> None:
    BDHConfig().save_pretrained(tmp_path)
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is BDHTokenizer


def test_another_vocabulary_is_refused_and_not_replaced(tmp_path: Path) -> None:
    BDHConfig().save_pretrained(tmp_path)
    Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="other tokens than the 256 bytes"):
        AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TokenizersBackend"}))
    assert AutoTokenizer.from_pretrained(tmp_path)("ab")["input_ids"] == [2]


@pytest.mark.parametrize("where", ["tokenizer_config.json", "config.json"])
def test_a_folder_that_names_byt5_gets_byt5(where: str, tmp_path: Path) -> None:
    BDHConfig().save_pretrained(tmp_path)
    if where == "config.json":
        config = json.loads((tmp_path / where).read_text())
        (tmp_path / where).write_text(json.dumps(config | {"tokenizer_class": "ByT5Tokenizer"}))
    else:
        ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer) is ByT5Tokenizer
    assert tokenizer("a")["input_ids"] == [100, 1]


def test_a_folder_of_byt5_is_of_byt5_after_bdh_convert_too(tmp_path: Path) -> None:
    BDHForCausalLM(BDHConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(tmp_path / "m")
    ByT5Tokenizer().save_pretrained(tmp_path / "m")
    convert(tmp_path / "m", "torch", tmp_path / "m.pt", Settings())
    convert(tmp_path / "m.pt", "hf", tmp_path / "again", Settings())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert type(tokenizer) is ByT5Tokenizer
    assert tokenizer("a")["input_ids"] == [100, 1]


def test_a_stream_shows_no_half_characters() -> None:
    text = "é 🐉 龍龍é\n ŷ🧑\u200d🚀"
    streamer = TextIteratorStreamer(TOKENIZER)
    for token in ids_of(text):
        streamer.put(torch.tensor([token]))
    streamer.end()
    pieces = list(streamer)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.fixture
def writer(load: Callable[..., BDHForCausalLM], form: str, tmp_path: Path) -> Path:
    """A folder with a model of bytes, and the tokenizer."""
    case = Case(Sizes(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=4), time=2, seed=3, scale=10)
    load(case, form, torch.float32, pad_token_id=256).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    return tmp_path


def test_a_batch_of_prompts_gets_the_texts_that_each_would_get(writer: Path, form: str) -> None:
    write = pipeline("text-generation", model=writer, model_kwargs={"attn_implementation": form})
    prompts = ["The dragon", "é", "hatchling 🐉 <pad>", "\0"]
    options = {"max_new_tokens": 12, "do_sample": False}
    alone = [write(prompt, **options)[0]["generated_text"] for prompt in prompts]
    assert all(text.startswith(prompt) for text, prompt in zip(alone, prompts, strict=True))
    assert [[{"generated_text": text}] for text in alone] == write(prompts, batch_size=2, **options)
    batch = TOKENIZER(prompts, padding=True, return_tensors="pt")
    assert alone == TOKENIZER.batch_decode(write.model.generate(**batch, **options), skip_special_tokens=True)


def test_a_chat_is_answered(writer: Path, form: str) -> None:
    write = pipeline("text-generation", model=writer, model_kwargs={"attn_implementation": form})
    answer = write(MESSAGES, max_new_tokens=5, do_sample=False)[0]["generated_text"][-1]
    prompt = TOKENIZER.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt")
    written = write.model.generate(**prompt, max_new_tokens=5, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert answer == {"role": "assistant", "content": TOKENIZER.decode(written, skip_special_tokens=True)}


def test_an_end_is_learned_once_the_vocabulary_has_it(writer: Path) -> None:
    tokenizer = BDHTokenizer(eos_token="<eos>")
    ids = torch.tensor([tokenizer("ab" + tokenizer.eos_token)["input_ids"]])
    model = BDHForCausalLM.from_pretrained(writer, pad_token_id=None)
    with pytest.raises(IndexError, match=r"^token 256 is none of the 256 of the vocabulary.*resize_token_embeddings"):
        model(ids)
    model.resize_token_embeddings(len(tokenizer))
    before = model(ids).logits[0, 1].log_softmax(-1)[256]
    model(ids, labels=ids).loss.backward()
    with torch.no_grad():
        for weight in model.parameters():
            weight -= 1e-3 * weight.grad
    assert model(ids).logits[0, 1].log_softmax(-1)[256] > before


def test_padding_outside_the_vocabulary_is_seen_without_a_mask_also_where_it_is_eos(writer: Path, form: str) -> None:
    model = BDHForCausalLM.from_pretrained(writer, attn_implementation=form)
    batch = TOKENIZER(["hatchling", "é"], padding=True, return_tensors="pt")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 256, "eos_token_id": 256}
    assert torch.equal(model.generate(batch["input_ids"], **options), model.generate(**batch, **options))
