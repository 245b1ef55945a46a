"""Records of many fields, as the hub keeps them (jsonl, parquet, datasets), made into text once."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from bdh_spec.files import shown, whole_file
from bdh_spec.params import Array
from bdh_train.config import TrainConfig, TrainError

Record: TypeAlias = Mapping[str, Any]

SUFFIXES = (".jsonl", ".ndjson", ".parquet")
USUAL = ("text", "content", "document")  # what the field is called where a record has one text
# The fields of each template, and what stands before each; a record without one of them goes without it, but for the last.
FIELDS = {
    "system": ("system", "response"),
    "instruction": ("instruction", "response"),
    "both": ("system", "instruction", "response"),
}
ALSO = {"response": ("response", "output", "answer", "completion"), "instruction": ("instruction", "prompt", "question")}


def extracted(source: Path | str, config: TrainConfig, target: Path) -> Iterator[Array]:
    """The text of each record, from ``target``, where they are written with their lengths the first time."""
    lengths = target.with_suffix(".lengths.npy")
    if not (target.is_file() and lengths.is_file()):
        target.parent.mkdir(parents=True, exist_ok=True)
        sizes = []
        with whole_file(target) as part, part.open("wb") as file:
            for number, record in enumerate(records(source)):
                sizes.append(file.write(text_of(record, config, f"record {number} of {source}")))
        with whole_file(lengths) as part, part.open("wb") as file:
            np.save(file, np.array(sizes, np.int64))
    ends = ends_of(lengths)
    whole = np.memmap(target, np.uint8, "r") if target.stat().st_size else np.zeros(0, np.uint8)
    if (int(ends[-1]) if len(ends) else 0) != len(whole):
        raise damaged(target.parent)
    yield from (whole[end - size : end] for end, size in zip(ends.tolist(), np.diff(ends, prepend=0).tolist(), strict=True))


def ends_of(lengths: Path) -> Array:
    """Where each text ends, from the file of their lengths."""
    try:
        sizes = np.load(lengths)
    except (ValueError, EOFError):
        raise damaged(lengths.parent) from None
    return np.cumsum(sizes)


def damaged(folder: Path) -> TrainError:
    """Texts that are no more what was written: nothing but what the records say is lost with them."""
    return TrainError(f"{folder} is damaged: remove it, and the texts of the records are written there again")


def named_on_the_hub(name: str) -> str:
    """The name of a dataset, which no path is, if datasets can be asked for it."""
    if not name or name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix:
        raise TrainError(f"{name} does not exist: check the path")
    try:
        importlib.import_module("datasets")
    except ModuleNotFoundError:
        raise TrainError(
            f"{name} does not exist here; for a dataset of the Hugging Face hub of that name: pip install 'bdh-spec[data]'"
        ) from None
    return name


def records(source: Path | str) -> Iterator[Record]:
    """Every record of a file, or of the training split of a dataset."""
    if isinstance(source, str):
        return of_dataset(source)
    return of_parquet(source) if source.suffix.lower() == ".parquet" else of_lines(source)


def of_lines(path: Path) -> Iterator[Record]:
    """The objects of a file of JSON lines."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise TrainError(f"line {number} of {path} is no JSON ({shown(error, 80)}): mend or remove it") from None
            if not isinstance(record, dict):
                raise TrainError(f"line {number} of {path} is a {type(record).__name__}: each line is one object")
            yield record


def of_parquet(path: Path) -> Iterator[Record]:
    """The rows of a parquet file, some at a time."""
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError:
        raise TrainError(f"{path} is parquet, which pyarrow reads: pip install 'bdh-spec[data]'") from None
    try:
        for rows in parquet.ParquetFile(path).iter_batches():
            yield from rows.to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own are ValueErrors
        raise TrainError(f"{path} is no whole parquet file ({shown(error, 120)}): copy it again") from None


def of_dataset(name: str) -> Iterator[Record]:
    """The records of a dataset's training split, fetched as they are read."""
    datasets: Any = importlib.import_module("datasets")
    try:
        yield from datasets.load_dataset(name, split="train", streaming=True)
    except Exception as error:  # noqa: BLE001  the hub and the scripts around it raise anything
        raise TrainError(
            f"the dataset {name} could not be read ({shown(error, 200)}): check its name and the network"
        ) from None


def text_of(record: Record, config: TrainConfig, where: str) -> bytes:
    """What a record says: its text fields, or those of the template, each under its name."""
    if config.template:
        return by_template(record, config.template, where).encode()
    names = config.text_fields or usual(record, where)
    return "\n\n".join(value_of(record, name, where) for name in names).encode()


def by_template(record: Record, template: str, where: str) -> str:
    """The fields of a template, as SYSTEM, INSTRUCTION and RESPONSE; ``full`` takes all fields that are text."""
    if template == "full":
        names = [name for name, value in record.items() if isinstance(value, str) and value]
        return "\n\n".join(f"{name.upper()}: {record[name]}" for name in names)
    found = {
        name: next((n for n in ALSO.get(name, (name,)) if isinstance(record.get(n), str)), None) for name in FIELDS[template]
    }
    if missing := [name for name, field in found.items() if field is None]:
        raise TrainError(
            f"{where} has no {missing[0]}, which the template {template} takes: it has {shown(', '.join(record), 200)}"
        )
    return "\n\n".join(f"{name.upper()}: {record[field]}" for name, field in found.items() if field)


def usual(record: Record, where: str) -> tuple[str, ...]:
    """The field that holds the text, where nobody says which."""
    texts = [name for name, value in record.items() if isinstance(value, str)]
    names = [name for name in USUAL if name in texts] or texts
    if len(names) == 1 or (names and names[0] in USUAL):
        return (names[0],)
    raise TrainError(
        f"{where} has {shown(', '.join(record) or 'no fields', 200)}: say which hold the text with --text-fields or --template"
    )


def value_of(record: Record, name: str, where: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        has = "no such field" if name not in record else f"a {type(value).__name__} there"
        raise TrainError(f"{where} has {has}: {name} of --text-fields must be text; it has {shown(', '.join(record), 200)}")
    return value
