"""What is learned from: files, folders and records of every kind; and which bytes a step reads of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bdh_train import TrainConfig, TrainError
from bdh_train.batches import batches, held_out, lengths
from bdh_train.data import Text, gather, open_data

RECORDS = [
    {"system": "Be short.", "instruction": f"What is {i}?", "response": f"A number, {i}.", "id": i, "tag": "é"}
    for i in range(40)
]
JOINED = {
    "system": "SYSTEM: Be short.\n\nRESPONSE: A number, 7.",
    "instruction": "INSTRUCTION: What is 7?\n\nRESPONSE: A number, 7.",
    "both": "SYSTEM: Be short.\n\nINSTRUCTION: What is 7?\n\nRESPONSE: A number, 7.",
    "full": "SYSTEM: Be short.\n\nINSTRUCTION: What is 7?\n\nRESPONSE: A number, 7.\n\nTAG: é",
}


def config(*data: Path | str, **more: Any) -> TrainConfig:
    return TrainConfig(**{"data": tuple(map(str, data)), "block_size": 16, "batch_size": 3, **more})


def whole(text: Text) -> bytes:
    return text.read(0, len(text)).tobytes()


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, list[dict[str, Any]]], Path]:
    """Records in a file of the hub's own formats."""

    def to_file(name: str, records: list[dict[str, Any]]) -> Path:
        path = tmp_path / name
        if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(records), path)
        else:
            path.write_text("".join(json.dumps(record) + "\n" for record in records) + "\n")
        return path

    return to_file


def test_a_file_stays_on_the_disk(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(256)) * 4)
    text = gather([str(tmp_path / "a.txt")], config(tmp_path / "a.txt"), tmp_path / "made")
    assert isinstance(text.parts[0], np.memmap)
    assert whole(text) == bytes(range(256)) * 4
    assert not (tmp_path / "made").exists()


def test_files_and_folders_are_read_as_one_text(tmp_path: Path) -> None:
    for name, words in {
        "one/b.txt": b"bee",
        "one/a.md": b"ant",
        "one/.hidden": b"no",
        "one/in/c": b"cat",
        "z.txt": b"zoo",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(words)
    names = [str(tmp_path / "z.txt"), str(tmp_path / "one")]
    assert whole(gather(names, config(*names), tmp_path / "made")) == b"zoo\nant\nbee\ncat"
    shuffled = [whole(gather(names, config(*names, shuffle_documents=True, seed=s), tmp_path / "made")) for s in (1, 1, 2)]
    assert shuffled[0] == shuffled[1] != shuffled[2]
    assert sorted(shuffled[0].split(b"\n")) == [b"ant", b"bee", b"cat", b"zoo"]


@pytest.mark.parametrize("name", ["r.jsonl", "r.parquet"])
@pytest.mark.parametrize("template", JOINED)
def test_a_template_joins_the_fields_of_a_record(write: Any, tmp_path: Path, name: str, template: str) -> None:
    path = write(name, RECORDS)
    text = whole(gather([str(path)], config(path, template=template), tmp_path / "made")).decode()
    assert JOINED[template] in text
    assert text.count("RESPONSE: ") == 40


@pytest.mark.parametrize("name", ["r.jsonl", "r.parquet"])
def test_text_fields_say_what_the_text_is_and_a_field_called_text_needs_no_saying(
    write: Any, tmp_path: Path, name: str
) -> None:
    path = write(name, [{"text": f"line {i}", "url": "x"} for i in range(3)])
    assert whole(gather([str(path)], config(path), tmp_path / "1")) == b"line 0\nline 1\nline 2"
    fields = config(path, text_fields=("url", "text"))
    assert whole(gather([str(path)], fields, tmp_path / "2")) == b"x\n\nline 0\nx\n\nline 1\nx\n\nline 2"


def test_records_are_written_once_and_read_from_there(write: Any, tmp_path: Path) -> None:
    path = write("r.jsonl", RECORDS)
    first = gather([str(path)], config(path, template="both"), tmp_path / "made")
    path.write_text("")
    again = gather([str(path)], config(path, template="both"), tmp_path / "made")
    assert whole(first) == whole(again)
    assert isinstance(again.parts[0].base, np.memmap)


@pytest.mark.parametrize("which", ["0-r.jsonl.bin", "0-r.jsonl.lengths.npy"])
@pytest.mark.parametrize("left", [0, 90])
def test_what_was_written_of_records_and_cut_short_since_is_refused(write: Any, tmp_path: Path, which: str, left: int) -> None:
    path, made = write("r.jsonl", RECORDS), tmp_path / "made"
    gather([str(path)], config(path, template="both"), made)
    (made / which).write_bytes((made / which).read_bytes()[:left])
    with pytest.raises(TrainError, match=rf"{made} is damaged: remove it"):
        gather([str(path)], config(path, template="both"), made)


def test_a_dataset_is_loaded_by_its_name(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By ``datasets`` itself, from a folder of the hub's form: no test reaches the hub."""
    folder = tmp_path / "owner" / "tiny"
    folder.mkdir(parents=True)
    write("owner/tiny/train.jsonl", RECORDS)
    import datasets

    real, monkeypatch_to = datasets.load_dataset, str(folder)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, **how: real(monkeypatch_to, **how) if name == "owner/tiny" else 1 / 0
    )
    monkeypatch.chdir(tmp_path / "owner")
    text = whole(gather(["owner/tiny"], config("owner/tiny", template="both"), tmp_path / "made")).decode()
    assert text.count("RESPONSE: ") == 40
    with pytest.raises(TrainError, match=r"^the dataset owner/other could not be read .*check its name and the network$"):
        gather(["owner/other"], config("owner/other"), tmp_path / "other")


def test_a_tenth_is_held_out_unless_a_text_to_measure_on_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(250)) * 4)
    (tmp_path / "b.txt").write_bytes(b"b" * 100)
    training, measured = open_data(config(tmp_path / "a.txt"), tmp_path)
    assert (len(training), len(measured)) == (900, 100)
    assert whole(training) + whole(measured) == bytes(range(250)) * 4
    training, measured = open_data(config(tmp_path / "a.txt", val=str(tmp_path / "b.txt")), tmp_path)
    assert (len(training), whole(measured)) == (1000, b"b" * 100)


@pytest.mark.parametrize("cut", [(0, 3), (2, 9), (4, 5), (0, 14)])
def test_a_text_of_many_parts_is_read_and_cut_like_one(cut: tuple[int, int]) -> None:
    parts = tuple(np.frombuffer(part, np.uint8) for part in (b"abc", b"d", b"efghij", b"klmn"))
    text, joined = Text(parts), b"abcdefghijklmn"
    for start in range(14):
        for length in range(1, 15 - start):
            assert text.read(start, length).tobytes() == joined[start : start + length]
    assert whole(text.cut(*cut)) == joined[cut[0] : cut[1]]
    assert text.fingerprint() == Text((np.frombuffer(joined, np.uint8),)).fingerprint() != text.cut(0, 13).fingerprint()


def test_a_step_reads_the_same_bytes_whoever_asks_and_no_other_step_does() -> None:
    text = Text((np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8),))
    c = config("x", accumulate=2)
    (tokens, targets), (other, _) = batches(c, text, 7)
    assert np.array_equal(batches(c, text, 7)[0][0], tokens)
    assert np.array_equal(tokens[:, 1:], targets[:, :-1])
    assert tokens.shape == (3, 16)
    assert not np.array_equal(tokens, other)
    assert not np.array_equal(tokens, batches(c, text, 8)[0][0])
    assert not np.array_equal(tokens, batches(config("x", accumulate=2, seed=1), text, 7)[0][0])
    # Frozen, because runs that are resumed by a later release must go on with the bytes that they would have read.
    assert tokens[0, :6].tolist() == [52, 31, 213, 128, 150, 119]


def test_windows_of_mixed_length_have_as_many_bytes_in_each_step() -> None:
    text = Text((np.zeros(5000, np.uint8),))
    c = config("x", block_size=64, min_block_size=10, batch_size=2)
    shapes = {batches(c, text, step)[0][0].shape for step in range(1, 60)}
    assert lengths(c) == [64, 32, 16]
    assert shapes == {(2, 64), (4, 32), (8, 16)}


def test_the_last_steps_read_the_longest_windows_and_so_does_the_measure() -> None:
    text = Text((np.zeros(5000, np.uint8),))
    longer = {"long_block_size": 256, "long_steps": 3, "accumulate": 2}
    c = config("x", block_size=64, min_block_size=32, batch_size=2, max_steps=20, **longer)
    shapes = [{tokens.shape for tokens, _ in batches(c, text, step)} for step in range(1, 21)]
    assert set().union(*shapes[:17]) == {(2, 64), (4, 32)}
    assert set().union(*shapes[17:]) == {(1, 256)}
    assert [c.tokens_of(step) for step in (17, 18)] == [2 * 128, 2 * 256]
    assert [c.tokens_after(step) for step in (15, 18, 20)] == [2 * 2 * 128 + 3 * 2 * 256, 2 * 2 * 256, 0]
    assert {tokens.shape for tokens, _ in held_out(c, text)} == {(1, 256)}
    assert config("x", block_size=64, batch_size=8, long_block_size=256).rows(256) == 2


def test_what_is_measured_is_the_same_every_time_and_of_one_shape() -> None:
    text = Text((np.arange(100, dtype=np.uint8),))
    rows = list(held_out(config("x", eval_batches=1), text))
    assert [tokens[:, 0].tolist() for tokens, _ in rows] == [[0, 32, 80]]
    whole_of_it = list(held_out(config("x", eval_batches=50), text))
    assert [tokens[:, 0].tolist() for tokens, _ in whole_of_it] == [[0, 16, 32], [48, 64, 80]]


@pytest.mark.parametrize(
    ("records", "more", "sentence"),
    [
        ([{"text": 5}], {}, "record 0 of .* has text: say which hold the text with --text-fields or --template"),
        ([{"a": "x", "b": "y"}], {}, "has a, b: say which hold the text"),
        ([{"a": "x"}], {"text_fields": "c"}, "has no such field: c of --text-fields must be text; it has a"),
        ([{"a": "x"}], {"template": "both"}, "record 0 of .* has no system, which the template both takes: it has a"),
    ],
)
def test_records_without_the_text_asked_for_are_refused(
    write: Any, tmp_path: Path, records: Any, more: Any, sentence: str
) -> None:
    path = write("r.jsonl", records)
    with pytest.raises(TrainError, match=sentence):
        gather([str(path)], config(path, **more), tmp_path / "made")
    assert not list((tmp_path / "made").glob("*.bin"))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text', "line 2 of .*a.jsonl is no JSON"),
        ("a.jsonl", b"[1]\n", "line 1 of .*a.jsonl is a list: each line is one object"),
        ("a.parquet", b"PAR1 and then nothing", "a.parquet is no whole parquet file"),
        ("a.txt", b"", "a.txt holds no text: name a file that is not empty"),
        (
            "a.txt",
            b"0123456789" * 17,
            "17 bytes are held out, and a window of block_size takes 18: give more text, .* or --val",
        ),
    ],
)
def test_files_that_hold_no_text_to_learn_are_refused(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TrainError, match=sentence):
        open_data(config(tmp_path / name, block_size=17 if b"012" in content else 16), tmp_path / "made")
