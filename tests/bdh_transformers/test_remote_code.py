"""A saved folder carries its code: it runs, and is saved again, where none of our packages is installed."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, TorchAoConfig, Trainer, TrainingArguments
from transformers.dynamic_module_utils import get_imports, get_relative_import_files, get_relative_imports

import bdh_spec
from bdh_transformers import BDHConfig, BDHForCausalLM, BDHModel, BDHTokenizer
from bdh_transformers.remote_code import AUTO_MAP, PACKAGES, files, made_relative

SITE = Path(torch.__file__).parents[1]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_internal_dim_multiplier": 4}
TOKENS = torch.arange(40)[None] * 5
FORMS = ("bdh_recurrent", "bdh_parallel")

# No site module, so that editable installations are not found; the packages of others are.
ALONE = f"""
import sys
sys.path.append({str(SITE)!r})
for name in {PACKAGES}:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{{name}} is here")
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
load = lambda folder, **options: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()
tokens, forms = torch.tensor({TOKENS.tolist()}), {FORMS}
"""


def model(seed: int = 0, **options: Any) -> BDHForCausalLM:
    """A small model of bytes, with weights large enough for every one of them to be heard."""
    torch.manual_seed(seed)
    made = BDHForCausalLM(BDHConfig(**SIZES, **options)).eval()
    for weight in made.parameters():
        weight.data.mul_(20)
    return made


def alone(script: str, home: Path, *arguments: object, flags: tuple[str, ...] = ("-S", "-I")) -> str:
    """What a script says that runs in a process where our packages cannot be imported."""
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *flags, "-c", script, *map(str, arguments)],
        env=environment,
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty cache of the hub, for a process that has nothing of ours."""
    if any((SITE / package).exists() for package in PACKAGES):
        pytest.skip("these packages are installed beside torch, so no process can have one without the other")
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


SAYS = """
said, first, again, out = {}, *sys.argv[1:]
for form in forms:
    model = load(first, attn_implementation=form)
    said[form] = model(tokens).logits.detach()
    said[f"{form} bfloat16"] = load(first, attn_implementation=form, dtype=torch.bfloat16)(tokens).logits.detach()
    said[f"{form} generates"] = model.generate(tokens, max_new_tokens=8, do_sample=False)
said["tied"] = model.lm_head.weight is model.backbone.embed.weight
said["body"] = AutoModel.from_pretrained(first, trust_remote_code=True).eval()(tokens).last_hidden_state.detach()
tokenizer = AutoTokenizer.from_pretrained(first, trust_remote_code=False)
said["tokenizer"] = tokenizer(["a<pad>", "Ā"], padding=True)["input_ids"]
model.save_pretrained(again)
said["again"] = load(again, attn_implementation=form)(tokens).logits.detach()
torch.save(said, out)
"""


NARROW = """
first, again, out = sys.argv[1:]
model = load(first)
model.save_pretrained(again)
said = {form: load(again, attn_implementation=form)(tokens).logits.detach() for form in forms}
torch.save(said | {"stored": {type(head.weight).__name__ for head in model.backbone.decoder}}, out)
"""


@torch.no_grad()
def test_a_quantised_folder_runs_and_is_saved_again_where_none_of_our_packages_is(home: Path, tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "wide")
    way = TorchAoConfig(Int8WeightOnlyConfig())
    narrow = BDHForCausalLM.from_pretrained(tmp_path / "wide", quantization_config=way)
    narrow.save_pretrained(tmp_path / "first")
    alone(ALONE + NARROW, home, tmp_path / "first", tmp_path / "again", tmp_path / "said")
    found = torch.load(tmp_path / "said")
    assert found["stored"] == {"Int8Tensor"}
    for form in FORMS:
        narrow.set_attn_implementation(form)
        assert torch.equal(found[form], narrow(TOKENS).logits)


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.thorough)], ids=["own head", "tied head"])
@torch.no_grad()
def test_a_folder_runs_and_is_saved_again_where_none_of_our_packages_is(tied: bool, home: Path, tmp_path: Path) -> None:
    made = model(tie_word_embeddings=tied)
    made.save_pretrained(tmp_path / "first")
    BDHTokenizer().save_pretrained(tmp_path / "first")
    alone(ALONE + SAYS, home, tmp_path / "first", tmp_path / "again", tmp_path / "said")
    found = torch.load(tmp_path / "said")

    for form in FORMS:
        made.set_attn_implementation(form)
        assert torch.equal(found[form], made(TOKENS).logits)
        assert torch.equal(found[f"{form} generates"], made.generate(TOKENS, max_new_tokens=8, do_sample=False))
        narrow = BDHForCausalLM.from_pretrained(tmp_path / "first", dtype=torch.bfloat16, attn_implementation=form)
        assert found[f"{form} bfloat16"].dtype == torch.bfloat16
        assert torch.equal(found[f"{form} bfloat16"], narrow(TOKENS).logits)
    assert torch.equal(found["again"], made(TOKENS).logits)
    assert torch.equal(found["body"], BDHModel.from_pretrained(tmp_path / "first").eval()(TOKENS).last_hidden_state)
    assert found["tied"] is tied
    assert found["tokenizer"] == BDHTokenizer()(["a<pad>", "Ā"], padding=True)["input_ids"]
    for file in (tmp_path / "first").iterdir():
        if "tokenizer" not in file.name and file.name != "chat_template.jinja":  # of the tokenizer too
            assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


TWO = """
first, second = load(sys.argv[1]), load(sys.argv[2])
assert type(first) is not type(second)
long = torch.arange(2000)[None] % 256
print(first.generate(long, max_new_tokens=4, do_sample=False)[0, -4:].tolist())
"""


HUB = """
model = load("me/bdh")
model.save_pretrained(sys.argv[1])
torch.save(model(tokens).logits.detach(), sys.argv[2])
"""


@pytest.mark.thorough
def test_a_repository_of_the_hub_runs_and_is_saved_as_a_folder_of_its_own(home: Path, tmp_path: Path) -> None:
    made, downloaded = model(), home / "hub" / "models--me--bdh"
    made.save_pretrained(downloaded / "snapshots" / ("1" * 40))  # as the hub's client keeps what it has downloaded
    (downloaded / "refs").mkdir()
    (downloaded / "refs" / "main").write_text("1" * 40)
    alone(ALONE + HUB, home, tmp_path / "again", tmp_path / "said")
    assert torch.equal(torch.load(tmp_path / "said"), made(TOKENS).logits)
    assert code(tmp_path / "again") == files()
    assert json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_two_folders_run_side_by_side(home: Path, tmp_path: Path) -> None:
    made = model()
    for folder in ("one", "two"):
        made.save_pretrained(tmp_path / folder)
    long = torch.arange(2000)[None] % 256
    expected = made.generate(long, max_new_tokens=4, do_sample=False)[0, -4:].tolist()
    assert json.loads(alone(ALONE + TWO, home, tmp_path / "one", tmp_path / "two")) == expected


INSTALLED = """
import sys
from transformers import AutoModelForCausalLM
load = AutoModelForCausalLM.from_pretrained
print(type(load(sys.argv[1], trust_remote_code=True)).__module__.split(".")[0])
assert "bdh_transformers" not in sys.modules
import bdh_transformers
print(type(load(sys.argv[1])).__module__.split(".")[0])
print(type(load(sys.argv[1], trust_remote_code=True)).__module__.split(".")[0])
"""


def test_the_installed_classes_are_used_once_they_are_imported(home: Path, tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "m")
    # transformers prefers what is registered to what is trusted.
    expected = ["transformers_modules", "bdh_transformers", "bdh_transformers"]
    assert alone(INSTALLED, home, tmp_path / "m", flags=()).split() == expected


def test_no_question_is_asked_of_whoever_has_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail(question))
    model().save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is BDHConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is BDHModel
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is BDHForCausalLM


def code(folder: Path) -> dict[str, str]:
    """The Python files of a folder."""
    return {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}


def siblings(source: str) -> set[str]:
    """The files that a source imports from its own folder."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.level]
    return {f"{name}.py" for node in nodes for name in ([node.module] if node.module else [a.name for a in node.names])}


def test_every_import_is_found_in_the_folder_or_belongs_to_others(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    assert code(tmp_path) == files()
    others = {"numpy", "torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
    for name, source in files().items():
        assert set(get_imports(tmp_path / name)) <= others, name
        assert siblings(source) <= set(files()), name


def test_transformers_finds_every_import_and_from_the_model_every_file(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    for name, source in files().items():  # it reads sources with a pattern that not all spellings match
        assert {f"{module}.py" for module in get_relative_imports(tmp_path / name)} == siblings(source), name
    reached = {Path(file).name for file in get_relative_import_files(tmp_path / "modeling_bdh.py")}
    assert reached | {"modeling_bdh.py"} == set(files())


def test_every_file_says_whence_it_comes() -> None:
    for name, source in files().items():
        first, second = source.splitlines()[:2]
        assert first.startswith(f"# Generated by bdh_transformers {bdh_spec.__version__} from its module bdh_"), name
        assert "Apache License, Version 2.0" in second, name


def test_names_that_a_package_hands_on_are_taken_from_where_they_are_defined() -> None:
    source = "def f():\n    from bdh_spec import ParamsError as E, rope as spec\n    return E, spec\n"
    changed, needed = made_relative(source)
    assert needed == {"bdh_spec.errors", "bdh_spec.rope"}
    assert "\n    from .bdh_spec_errors import ParamsError as E\n" in changed
    assert "\n    from . import bdh_spec_rope as spec\n" in changed
    assert made_relative("from bdh_torch.model import BDH\n")[1] == {"bdh_torch.model"}
    assert made_relative("import torch\nfrom math import pi\n") == ("import torch\nfrom math import pi\n", set())


@pytest.mark.parametrize(
    ("source", "complaint"),
    [("import bdh_torch.rope", "cannot be made relative"), ("from bdh_spec import __version__", "is defined in bdh_spec")],
)
def test_an_import_that_no_folder_can_satisfy_is_refused(source: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        made_relative(source)


def test_whatever_saves_a_configuration_saves_the_code(tmp_path: Path) -> None:
    def complete(folder: Path) -> bool:
        return code(folder) == files() and json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP

    made = model()
    BDHModel(made.config).save_pretrained(tmp_path / "body")
    made.config.save_pretrained(tmp_path / "config")
    Trainer(made, TrainingArguments(tmp_path / "run", report_to=[])).save_model(tmp_path / "trainer")
    assert all(complete(tmp_path / folder) for folder in ("body", "config", "trainer"))
    made.config.to_json_file(tmp_path / "other.json")
    assert not code(tmp_path)


def test_a_class_registered_by_hand_does_not_spoil_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BDHConfig, "_auto_class", "AutoConfig")
    monkeypatch.setattr(BDHForCausalLM, "_auto_class", "AutoModelForCausalLM")
    model().save_pretrained(tmp_path)
    assert code(tmp_path) == files()


@pytest.fixture
def uploaded(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The files that would have gone to the hub."""
    names: set[str] = set()

    def create_repo(self: Any, repo_id: str, **options: Any) -> Any:
        return type("Url", (), {"repo_id": repo_id})

    def create_commit(self: Any, operations: list[Any], **options: Any) -> None:
        names.update(operation.path_in_repo for operation in operations)

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create_repo)
    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", create_commit)
    card = type("Card", (), {"save": lambda path: Path(path).write_text("")})
    for module in ("utils.hub", "modeling_utils"):
        monkeypatch.setattr(f"transformers.{module}.create_and_tag_model_card", lambda *names, **options: card)
    return names


@pytest.mark.parametrize(
    "push",
    [
        lambda made, folder: made.push_to_hub("me/bdh"),
        lambda made, folder: made.save_pretrained(folder, push_to_hub=True, repo_id="me/bdh"),
        lambda made, folder: made.config.push_to_hub("me/bdh"),
        # It takes no Path where it uploads.
        lambda made, folder: made.config.save_pretrained(str(folder), push_to_hub=True, repo_id="me/bdh"),
    ],
    ids=["model.push_to_hub", "model.save_pretrained", "config.push_to_hub", "config.save_pretrained"],
)
def test_all_of_a_folder_is_uploaded(
    push: Callable[[BDHForCausalLM, Path], None], uploaded: set[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    push(model(), tmp_path)
    assert uploaded >= {"config.json", *files()}
    assert ("model.safetensors" in uploaded) is ("[model." in request.node.name)


def test_a_folder_can_be_uploaded_after_it_was_saved(uploaded: set[str], tmp_path: Path) -> None:
    made = model()
    made.save_pretrained(tmp_path)
    made.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/bdh")
    assert uploaded >= {"config.json", "model.safetensors", *files()}
