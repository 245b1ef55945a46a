"""The tests that transformers runs on every model of its own, from its source distribution.

``make`` unpacks it into ``.venv``. Nothing of it is kept in this repository.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import transformers

ALIAS = "tests_of_transformers"  # their folder is called tests, as ours is
FOLDER = Path(sys.prefix) / "transformers-tests" / f"transformers-{transformers.__version__}" / "tests"

# What its tests import from one another and the source distribution leaves out. The options of configurations are our choice.
LEFT_OUT: dict[str, dict[str, Any]] = {
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "utils.test_configuration_utils": {
        "config_common_kwargs": {
            "architectures": ["BDHModel"],
            "chunk_size_feed_forward": 3,
            "dtype": "float16",
            "id2label": {0: "a", 1: "b"},
            "is_encoder_decoder": False,
            "label2id": {"a": 0, "b": 1},
            "output_attentions": True,
            "output_hidden_states": True,
            "problem_type": "regression",
            "return_dict": False,
        }
    },
}


def load(name: str) -> ModuleType:
    """One of its test modules, such as ``test_modeling_common``."""
    if not FOLDER.is_dir():
        pytest.fail(
            f"the tests of transformers {transformers.__version__} are not in {FOLDER}: make test fetches them",
            False,
        )
    _package(ALIAS, FOLDER)
    for module, names in LEFT_OUT.items():
        _stand_in(module, names)
    # One module wants its own folder imported as if that were transformers, and makes no use of it.
    with mock.patch("transformers.utils.direct_transformers_import"):
        return importlib.import_module(f"{ALIAS}.{name}")


def _stand_in(module: str, names: dict[str, Any]) -> None:
    """Import a module of these names, unless the source distribution has come to carry it."""
    folder, _, file = module.rpartition(".")
    _package(f"{ALIAS}.{folder}", FOLDER / folder)
    if not (FOLDER / folder / f"{file}.py").exists():
        vars(sys.modules.setdefault(f"{ALIAS}.{module}", ModuleType(f"{ALIAS}.{module}"))).update(names)


def _package(name: str, folder: Path) -> None:
    sys.modules.setdefault(name, ModuleType(name)).__path__ = [str(folder)]
