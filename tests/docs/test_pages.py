"""Every Python snippet of docs/ runs as it stands, and every bdh-train line has flags that exist."""

import re
import shlex
from pathlib import Path

import click
import pytest

from bdh_train import TrainConfig
from bdh_train.cli import command
from bdh_train.config import resolve

PAGES = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
SNIPPETS = [
    pytest.param(code, id=f"{page.stem}-{i}")
    for page in PAGES
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
]
LINES = [
    pytest.param(line, id=f"{page.stem}-{i}")
    for page in PAGES
    for i, line in enumerate(re.findall(r"(bdh-train --[^`\n]*)", page.read_text(encoding="utf-8")))
]


# peft asks transformers under a name that is on its way out.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("code", SNIPPETS)
def test_a_snippet_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BDH_BACKEND", "numpy")
    (tmp_path / "book.txt").write_bytes(b"the dragon hatches, and the dragon flies. " * 100)
    small = ", n_embd=16, checkpoint_every=100, max_steps=2"
    exec(code.replace(", max_steps=200", small), {"__name__": "page"})


def test_the_first_lines_of_the_readme_run_as_pasted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BDH_BACKEND", "numpy")
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[0]
    exec(code, {"__name__": "readme"})
    *text, loss = capsys.readouterr().out.splitlines()
    assert "\n".join(text).startswith("The ")
    assert 0 < float(loss) < 10


@pytest.mark.parametrize("line", LINES)
def test_a_command_line_is_one_that_the_command_takes(line: str) -> None:
    with click.Context(command) as context:
        command.parse_args(context, shlex.split(line)[1:])
    given = {k: v for k, v in context.params.items() if v not in (None, ()) and k in TrainConfig.__dataclass_fields__}
    config = TrainConfig(**given)
    assert config.init_from or context.params["resume"] or resolve(config).model


def test_there_are_pages_for_those_who_come_from_elsewhere() -> None:
    assert {page.stem for page in PAGES} >= {"from-bdh-mlx", "from-bdh-transformers", "from-the-original", "training"}
    assert len(SNIPPETS) >= 6
    assert len(LINES) >= 6
