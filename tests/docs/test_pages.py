"""Every snippet of every page runs as it stands, in the order of the page, in a folder with the files that a reader would have.

Python runs here, each block by itself as if pasted into a fresh session, and what is shown with its answers (``pycon``) by
doctest. Consoles run in bash, with every command on PATH. What takes a GPU or hours is run smaller, by words that are put
after those of the page (``SMALLER``), or not at all where the page itself says why: then its options are looked up.
"""

from __future__ import annotations

import doctest
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace

import click
import numpy as np
import pages
import pytest
import yaml
from forked import Commands
from pages import COMMANDS, ROOT, Block
from rich.console import Console

import bdh_spec
from bdh_spec.checkpoint import EMBEDDED
from bdh_train import TrainConfig
from bdh_train.cli import command as train_command
from bdh_train.config import resolve

PAGES = pages.pages()
BLOCKS = {page: list(pages.blocks(page)) for page in PAGES}
EVERY = [block for found in BLOCKS.values() for block in found]
RUN = ("python", "pycon", "console")
READ = {"toml": tomllib.loads, "yaml": yaml.safe_load, "json": json.loads, "text": str}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DRAGON = b"the dragon hatches, and the dragon flies. "

# What is put after the words of a command, by a pattern of its line, the first that fits. The last of equal options counts.
TINY = "--n-embd 16 --n-head 2 --mlp-internal-dim-multiplier 8"
SHORT = "--block-size 32 --batch-size 2 --eval-batches 1 --quiet"
SMALLER = {
    "bdh-train *--resume*": "--max-steps 3 --quiet",
    "bdh-train *--init-from*": f"--max-steps 2 {SHORT}",
    "bdh-train *": f"--max-steps 2 {TINY} {SHORT}",
    "bdh-conform vectors *": "",
    "bdh-conform *": "--tier smoke --in-process --quiet",
    "bdh-look neurons *": "--max-bytes 512 --shifts 20 --checkpoint tiny.safetensors",
    "bdh-look graph *": "--max-bytes 512 --replicas 3 --controls 2 --checkpoint tiny.safetensors",
    "bdh-look state *--data*": "--max-bytes 512 --trials 2 --checkpoint tiny.safetensors",
    "python examples/serve_load.py *": "--clients 2 --new 3",
    "pytest *": "-q -p no:cacheprovider --bdh-tier smoke",
}
# And in Python: what a page has, and what is run instead.
SMALLER_PYTHON = {
    "docs/training.md": ("max_steps=200", "max_steps=2, n_embd=16, checkpoint_every=100"),
    "docs/transformers.md": ("max_steps=100", "max_steps=2, report_to=[], use_cpu=True"),
}
# Not of this project: what they are given is looked at by ``check_install`` or by make, and nothing is fetched.
ELSEWHERE = """
git() { test "$1 $2" = "clone $HOME_PAGE" && mkdir -p "${3:-$(basename "$2")}"; }
pip() { test "$1" = install; }
make() { command make --dry-run --directory "$ROOT" "$@" > made; }
ssh() { cat > "$1.received"; }
"""
PORT = "import sys; sys.path.insert(0, {examples!r}); from minimal_port import MyBackend\n"
# What a port that is not Python would do, in as few lines as can be: the published frequencies of a case, as raw numbers.
YOUR_PORT = """#!/bin/sh
mkdir -p "$2" && cp "$1/raw/frequencies.f32" "$2/frequencies.f32"
"""


@pytest.fixture(scope="session")
def commands() -> Iterator[Commands]:
    made = Commands()
    yield made
    made.close()


@pytest.fixture(scope="session")
def model_files(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model as others write it, what it remembers of two texts, and a model for what takes long."""
    folder = tmp_path_factory.mktemp("files")
    config = bdh_spec.BDHConfig(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=16)
    bdh_spec.save(folder / "tiny.safetensors", bdh_spec.init(config, np.random.default_rng(0)), config)
    convert, generate = (commands.folder / name for name in ("bdh-convert", "bdh-generate"))
    for name, dialect in (("checkpoint.pt", "torch"), ("checkpoint.safetensors", "torch"), ("bdh", "hf")):
        subprocess.run([convert, f"numpy-to-{dialect}", EMBEDDED, "-o", folder / name], check=True, capture_output=True)
    for name in ("before", "after"):
        told = ["--save-state", folder / f"{name}.safetensors", "--seed", "7", "-n", "5", "--backend", "numpy"]
        subprocess.run([generate, f"{name} ", *told], check=True, capture_output=True)
    return folder


# What only some pages speak of as if it were there; others make it.
ALSO = {
    "docs/from-bdh-transformers.md": {"bdh": "bdh"},
    "docs/live.md": {"after.safetensors": "state.safetensors", "tiny.safetensors": "run/model.safetensors"},
    "docs/look.md": {
        "tiny.safetensors": "run/checkpoint.safetensors",
        "before.safetensors": "before.safetensors",
        "after.safetensors": "after.safetensors",
    },
}


@pytest.fixture
def desk(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: Commands, model_files: Path
) -> Path:
    """A folder with the files that pages speak of: the embedded model as others write it, texts, a port under development."""
    monkeypatch.chdir(tmp_path)
    path = (f"{tmp_path}/bin", str(commands.folder), str(Path(sys.executable).parent), os.environ["PATH"])
    told = {"PATH": os.pathsep.join(path), "PYTHONPATH": str(tmp_path), "BROWSER": "true", "OMP_NUM_THREADS": "1"}
    told |= {"BDH_BACKEND": "numpy", "ROOT": str(ROOT), "HOME_PAGE": PROJECT["urls"]["Homepage"]}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    page = request.node.callspec.params.get("page", "") if hasattr(request.node, "callspec") else ""
    held = {"checkpoint.pt": "checkpoint.pt", "checkpoint.safetensors": "checkpoint.safetensors"} | ALSO.get(page, {})
    for source, name in held.items():
        Path(name).parent.mkdir(exist_ok=True)
        copy = shutil.copytree if (model_files / source).is_dir() else shutil.copy
        copy(model_files / source, name)
    shutil.copy(model_files / "tiny.safetensors", "tiny.safetensors")
    for name in ("book.txt", "input.txt", "text.txt"):
        Path(name).write_bytes(DRAGON * 40)
    Path("prompt.bin").write_bytes(b"The \xff")
    Path("known.toml").write_text("")
    for name in ("examples", "look", "tests", "requirements.lock"):
        Path(name).symlink_to(ROOT / name)
    files = {
        "mypkg/port.py": PORT.format(examples=str(ROOT / "examples")),
        "mine-0.dist-info/METADATA": "Metadata-Version: 2.1\nName: mine\nVersion: 0\n",
        "mine-0.dist-info/entry_points.txt": "[bdh_spec.backends]\nmine = mypkg.port:MyBackend\n",
        "bin/your-port": YOUR_PORT,
    }
    for name, text in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    Path("bin/your-port").chmod(0o755)
    return tmp_path


@pytest.mark.skipif(sys.platform == "win32", reason="the consoles of the pages are those of POSIX")
@pytest.mark.parametrize("page", [page for page in PAGES if any(block.language in RUN for block in BLOCKS[page])])
# peft asks transformers under a name that is on its way out.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.usefixtures("desk")
def test_the_snippets_of_a_page_run(page: str, hub: list[tuple[str, str]], capsys: pytest.CaptureFixture[str]) -> None:
    session: dict[str, object] = {"__name__": "page"}  # of what is shown with its answers
    for block in BLOCKS[page]:
        if block.why_not:
            continue
        if block.language == "python":
            paste(block)
        if block.language == "pycon":
            converse(block, session)
        if block.language == "console":
            type_in(block)
    said = capsys.readouterr().out
    if page == "README.md":
        *text, loss = said.splitlines()
        assert "\n".join(text).startswith("The ")
        assert 0 < float(loss) < 10
    if page == "docs/transformers.md":
        assert "The small smooth-skinned dragon" in said
        assert "<pad>" not in said
        assert hub == [("BDHForCausalLM", "me/bdh"), ("BDHTokenizer", "me/bdh")]


@pytest.fixture
def hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What was pushed to the hub, which is not asked."""
    pushed: list[tuple[str, str]] = []
    if "transformers" in str(request.node.name):
        transformers = importlib.import_module("transformers")
        for kind in (transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase):
            monkeypatch.setattr(kind, "push_to_hub", lambda self, name: pushed.append((type(self).__name__, name)))
    return pushed


def paste(block: Block) -> None:
    """Run Python as if it were pasted into a fresh session."""
    code = block.code
    large, small = SMALLER_PYTHON.get(block.page, ("", ""))
    code = code.replace(large, small) if large else code
    lines = "\n" * block.line  # so that a traceback names the line of the page
    exec(compile(lines + code, ROOT / block.page, "exec"), {"__name__": "page"})


def converse(block: Block, session: dict[str, object]) -> None:
    """Run what is shown with its answers, which have to be those."""
    example = doctest.DocTestParser().get_doctest(block.code, session, block.place, block.page, block.line)
    said: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(example, out=said.append, clear_globs=False)
    session.update(example.globs)
    assert result.attempted, f"{block.place} shows no line to run"
    assert not result.failed, "".join(said)


def type_in(block: Block) -> None:
    """Run the lines of a console in bash, and hold what it shows against what they print."""
    for line in block.commands():
        check_install(line)
    typed = "".join(f"printf '%s\\n' {shlex.quote('$ ' + line)} >&2\n{line}\n" for line in block.commands())
    script = f"set -eo pipefail\n{ELSEWHERE}{functions()}\n{typed}"
    done = subprocess.run(
        ["bash", "-c", script], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
    )
    assert done.returncode == 0, f"{block.place}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    if block.answer() and "$ make demo" not in block.code:  # whose answer another test looks at
        assert done.stdout == block.answer(), block.place


def functions() -> str:
    """The commands with the words that make them smaller behind those that are typed."""
    told: dict[str, list[str]] = {}
    for pattern, words in SMALLER.items():
        name = re.split(r"[ *]", pattern)[0]
        told.setdefault(name, []).append(f'{pattern.replace(" ", chr(92) + " ")}) command {name} "$@" {words};;')
    return "\n".join(
        f'{name}() {{ case "{name} $*" in {" ".join(cases)} *) command {name} "$@";; esac; }}' for name, cases in told.items()
    )


def check_install(line: str) -> None:
    """What a page lets pip install is there: an extra of this project or of what is installed, a file of this repository."""
    if "pip install" not in line:
        return
    words = shlex.split(line.partition("pip install")[2], comments=True)
    for name, extras in re.findall(r"(\S*?)\[([\w,]+)\]", " ".join(words)):
        ours = name.split("@")[0] in (".", "./bdh-spec", "bdh-spec")
        there = set(PROJECT["optional-dependencies"] if ours else metadata(name).get_all("Provides-Extra") or ())
        assert set(extras.split(",")) <= there, f"{name} has no {extras}"
    if "-r" in words:
        assert (ROOT / words[words.index("-r") + 1]).is_file()


@pytest.mark.parametrize("page", PAGES)
def test_what_is_set_apart_is_run_or_read_and_says_what_it_is(page: str) -> None:
    for block in BLOCKS[page]:
        assert block.language in (*RUN, *READ), f"{block.place} is {block.language or 'no language'}"
        if block.language in READ:
            READ[block.language](block.code)
        if block.language == "text":
            assert not re.search(r"(?m)^(\$ |>>> |import |from \w+ import )", block.code), f"{block.place} is no mere text"
        if block.language == "console":
            assert block.commands(), f"{block.place} shows no command"
        assert not block.why_not or block.language in RUN
    assert not any(re.search(r"<(pre|code|script)\b", said) for said in pages.html(page)), f"{page} hides code in HTML"
    marks = (ROOT / page).read_text(encoding="utf-8").count(pages.NOT_RUN)
    assert marks == sum(bool(block.why_not) for block in BLOCKS[page]), f"{page} excuses what is no snippet"


def test_few_snippets_are_not_run_and_each_says_why() -> None:
    excused = [block for block in EVERY if block.why_not]
    assert all(len(block.why_not.split()) >= 4 for block in excused)
    assert len(excused) * 10 <= sum(block.language in RUN for block in EVERY), [block.place for block in excused]


LINES = sorted(
    {
        line
        for page in PAGES
        for line in (*pages.inline(page), *(line for block in BLOCKS[page] if block.why_not for line in block.commands()))
        if line.split()[0] in COMMANDS or "-m bdh_train" in line or "pip install" in line
    }
)


@pytest.mark.parametrize("line", LINES)
def test_a_line_within_a_sentence_has_words_that_the_command_knows(line: str) -> None:
    check_install(line)
    own = re.sub(r".*-m bdh_train", "bdh-train", line)
    if own.split()[0] in COMMANDS:
        assert pages.unknown_options(own) == []
    if own.startswith("bdh-train --") and "..." not in own:
        with click.Context(train_command) as context:
            train_command.parse_args(context, shlex.split(own, comments=True)[1:])
        given = {k: v for k, v in context.params.items() if v not in (None, ()) and k in TrainConfig.__dataclass_fields__}
        assert TrainConfig(**given).init_from or context.params["resume"] or resolve(TrainConfig(**given)).model


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("demo")


def test_the_readme_shows_the_table_as_the_demo_prints_it(demo: ModuleType) -> None:
    (block,) = [block for block in BLOCKS["README.md"] if "$ make demo" in block.code]
    shown = block.answer()
    rows = []
    for line in shown.splitlines()[2:]:
        port, device, dtype, error, allowed, agrees, speed = line.split()
        compared = SimpleNamespace(error=float(error), allowed=float(allowed), complaint="" if agrees == "yes" else agrees)
        rows.append(demo.Row(port, device, dtype, compared, float(speed), b""))
    assert [(row.port, row.dtype) for row in rows] == demo.RUNS
    console = Console(highlight=False, width=100, color_system=None)
    with console.capture() as printed:
        console.print(demo.tabled(rows))
    assert [line.rstrip() for line in printed.get().splitlines()] == shown.splitlines()


def test_the_page_shows_the_texts_of_the_demo(demo: ModuleType) -> None:
    shown = next(block.code for block in BLOCKS["docs/getting-started.md"] if block.language == "text")
    assert f"from {demo.PROMPT!r} with seed {demo.SEED}:" in shown
    text = bdh_spec.load(backend="numpy").generate(demo.PROMPT, 60, temperature=0.7, top_k=50, seed=demo.SEED)
    assert text.decode() in shown


def test_the_page_that_begins_names_every_extra() -> None:
    page = (ROOT / "docs" / "getting-started.md").read_text(encoding="utf-8")
    table = page.split("| extra |")[1].split("\n\n")[0]
    named = {name for row in table.splitlines() for name in re.findall(r"`([\w-]+)`", row.partition(" | ")[0])}
    assert named == set(PROJECT["optional-dependencies"]) - {"dev"}


def test_there_are_pages_for_what_users_ask() -> None:
    asked = ("threads", "`bdh_jax`", "rate", "long may a text", "differs from the implementation")
    headings = re.findall(r"(?m)^## (.*)$", (ROOT / "docs" / "questions.md").read_text(encoding="utf-8"))
    assert all(any(words in heading for heading in headings) for words in asked)
    assert {"docs/from-bdh-mlx.md", "docs/from-bdh-transformers.md", "docs/from-the-original.md"} <= set(PAGES)
    assert np.all([len(BLOCKS[page]) >= 1 for page in ("README.md", "docs/training.md", "conformance/PORTING.md")])


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("```python\nimport bdh_spec\nbdh_spec.lod()\n```", "lod"),
        ("```pycon\n>>> 1 + 1\n3\n\n```", "Expected"),
        ("```console\n$ bdh-generate --nonesuch\n```", "nonesuch"),
        ("```console\n$ false | cat\n```", "false"),
        ("```console\n$ pip install -e '.[nonesuch]'\n```", "nonesuch"),
        ("```console\n$ git clone https://example.org/bdh\n```", "example.org"),
        ("```console\n$ make nonesuch\n```", "nonesuch"),
        ("```console\n$ echo one\ntwo\n```", "one"),
    ],
)
@pytest.mark.usefixtures("desk")
def test_a_mistake_in_a_snippet_is_seen(mistake: str, said: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(mistake)
    (block,) = pages.blocks(str(page))
    run = {"python": paste, "pycon": lambda block: converse(block, {}), "console": type_in}[block.language]
    with pytest.raises((AssertionError, AttributeError), match=said):
        run(block)


def test_a_block_that_says_nothing_of_what_it_is_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```\nimport bdh_spec\n```\n\n    indented\n\n- in a list\n\n  ```sh\n  ls\n  ```\n")
    assert [block.language for block in pages.blocks(str(page))] == ["", "indented", "sh"]
    assert shutil.which("bash"), "consoles are run by bash"
