"""The page in a real browser: the vectors there, and what somebody does who types, drops files and looks around."""

import base64
import html
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import Page

import bdh_spec
from bdh_conformance.files import vectors
from bdh_conformance.files.check import DIFFERS, check
from bdh_look.cli import main
from bdh_look.live import JAVASCRIPT, bundle, canonical, opened, page
from bdh_spec import BDHConfig, Params
from bdh_spec.checkpoint import EMBEDDED, metadata, read_state, save_state
from bdh_spec.files import write_safetensors
from bdh_spec.params import fingerprint

OPENING = "The quick brown fox jumps over the lazy dog. The quick brown f"
READ = "document.querySelector('#stop').disabled && /^\\d+ bytes/.test(document.querySelector('#status').textContent)"
TYPED = "document.querySelector('#text').value"
NOTICE = "document.querySelector('#notice:not([hidden]) p')?.textContent ?? ''"


def test_chromium_computes_the_published_vectors(browser: Page, tmp_path: Path) -> None:
    exported = tmp_path / "vectors"
    vectors.export(exported)
    folder = shutil.copytree(JAVASCRIPT, tmp_path / "port")
    shutil.copy(Path(__file__).with_name("vectors_page.mjs"), folder)
    cases = []
    for case in vectors.case_folders(exported):
        inputs = base64.b64encode((case / "inputs.safetensors").read_bytes()).decode()
        told = json.dumps({"manifest": json.loads((case / "manifest.json").read_text()), "inputs": inputs})
        cases.append(f'<script type="text/plain" data-case="{case.name}">{told}</script>')
    text = f'<!doctype html>{"".join(cases)}<script type="module">{bundle("vectors_page", folder)}</script>'
    (tmp_path / "vectors.html").write_text(text)
    browser.open(tmp_path / "vectors.html")
    browser.wait("document.title === 'done'")
    computed = "Object.fromEntries([...document.querySelectorAll('[data-case]')].map((e) => [e.dataset.case, e.textContent]))"
    for name, file in browser.run(computed).items():
        (tmp_path / "outputs" / name).mkdir(parents=True)
        (tmp_path / "outputs" / name / "outputs.safetensors").write_bytes(base64.b64decode(file))
    reports = check(exported, tmp_path / "outputs")
    assert len(reports) == len(cases) > 10
    for report in reports:
        assert {verdict.name for verdict in report.verdicts if not verdict.comparison} == {
            f"gradients.{name}" for name in Params._fields
        }
        assert not report.having(DIFFERS)


@pytest.fixture
def browser(chromium: Any) -> Iterator[Page]:
    """A page of the browser that nobody has been in."""
    opened = Page(chromium)
    yield opened
    opened.page.close()


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page with the embedded model."""
    path = tmp_path_factory.mktemp("page") / "live.html"
    path.write_text(page(EMBEDDED.read_bytes(), EMBEDDED.name), encoding="utf-8")
    return path


@pytest.fixture
def live(browser: Page, written: Path) -> Iterator[Page]:
    """The page, opened and its first text read; at the end its console must have been silent."""
    browser.open(written)
    browser.wait(READ)
    yield browser
    assert browser.console == []


def type_instead(live: Page, text: str) -> None:
    live.click("#afresh")
    live.type(text)
    live.wait(READ)


def test_the_page_is_there_in_two_seconds(browser: Page, written: Path) -> None:
    took = []
    while not took or (min(took) >= 2000 and len(took) < 5):  # another program may have had the processor
        browser.open(written)
        browser.wait("document.querySelectorAll('#next li').length")
        took.append(browser.run("performance.now()"))
    assert min(took) < 2000
    assert browser.run(TYPED) == OPENING


def test_it_writes_the_text_that_the_specification_writes(live: Page) -> None:
    type_instead(live, "The ")
    for name, value in {"bytes": "60", "temperature": "0.8", "top_k": "0", "seed": str(2**64 - 3)}.items():
        live.run(f"document.querySelector('#generate [name={name}]').value = '{value}'")
    live.click("#go")
    live.wait(
        "document.querySelector('#status').textContent.startsWith('64 bytes') && document.querySelector('#stop').disabled"
    )
    wanted = bdh_spec.load(backend="numpy").generate("The ", 60, 0.8, None, 2**64 - 3)
    found = live.run(f"[...{TYPED}].map((c) => c.charCodeAt(0) & 0xff)")
    assert bytes(found) == wanted


def test_losses_chances_and_attention_are_the_specification_s(live: Page) -> None:
    text = "one two one tw"
    type_instead(live, text)
    model = bdh_spec.load(backend="numpy")
    tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int64)[None]
    logits = model.forward(tokens)[0, -1].astype(np.float64)
    chances = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    shown = live.run("[...document.querySelectorAll('#next .byte')].map((e) => +e.title.split(' ')[1])")
    assert shown[0] == chances.argmax()
    assert chances[shown[3]] == pytest.approx(np.sort(chances)[-4], rel=1e-3)
    live.click("#layers label:nth-of-type(2) input")
    live.click("#heads label:nth-of-type(3) input")  # the second: the first are all
    scores = model.trace(tokens)["layers.1.scores"][0, 1, -1, :-1]
    best = int(np.abs(scores).argmax())
    assert live.run("document.querySelector('#back .place').title") == f"Look inside at byte {best + 1}"
    share = np.abs(scores[best]) / np.abs(scores).sum()
    assert float(live.run("document.querySelector('#back .share').textContent").rstrip("%")) == pytest.approx(
        100 * share, abs=0.6
    )


def test_everything_can_be_done_by_keyboard(live: Page) -> None:
    live.run("document.querySelector('#text').focus()")
    for _ in range(3):
        live.press("ArrowLeft")
    live.wait(f"document.querySelector('#here').textContent.startsWith('Inside, at byte {len(OPENING) - 3} w')")
    live.press("Tab")
    reached = []
    for _ in range(40):
        reached.append(live.run("document.activeElement.id || document.activeElement.name || document.activeElement.className"))
        live.press("Tab")
    assert {"go", "afresh", "layer", "head", "place", "save", "load", "phrase", "times", "teach"} <= set(reached)
    live.run("document.querySelector('[name=layer]').focus()")
    live.press("ArrowRight")
    assert live.run("document.querySelector('#memory-hint').textContent.includes('Layer 2 after this byte')")


def test_a_byte_in_the_middle_can_be_changed(live: Page) -> None:
    live.run("document.querySelector('#text').focus(); document.querySelector('#text').setSelectionRange(4, 9)")
    live.type("slow")
    live.wait(READ)
    text = OPENING.replace("quick", "slow", 1)
    assert live.run(TYPED) == text
    model = bdh_spec.load(backend="numpy")
    tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int64)[None]
    live.run("document.querySelector('#text').setSelectionRange(99, 99)")
    live.wait(f"document.querySelector('#here').textContent.startsWith('Inside, at byte {len(text)} f')")
    bits = model.loss(tokens[:, :-1], tokens[:, 1:]) / np.log(2)
    assert f"costs {bits:.2f} bits per byte" in live.run("document.querySelector('#next-after').textContent")


def test_a_character_of_several_bytes_is_read_byte_by_byte(live: Page) -> None:
    type_instead(live, "é\U0001f409")
    assert live.run("document.querySelector('#status').textContent").startswith("6 bytes")
    assert live.run("document.querySelector('#here').textContent").startswith("Inside, at byte 6 89")
    live.press("ArrowLeft")
    live.wait("document.querySelector('#here').textContent.startsWith('Inside, at byte 2 A9')")


def test_a_lesson_is_measured_beside_its_control(live: Page) -> None:
    live.run("document.querySelector('[name=times]').value = 2")
    live.run("document.querySelector('[name=phrase]').value = 'so it goes'")
    live.click("#teach")
    live.wait("document.querySelectorAll('#learned circle').length")
    assert live.run("document.querySelectorAll('#learned circle').length") == 4  # three readings and the control
    told = live.run("document.querySelector('#learned .verdict').textContent")
    tokens = np.frombuffer(f"{OPENING}\nso it goes\nso it goes\nso it goes".encode(), np.uint8).astype(np.int64)[None]
    model = bdh_spec.load(backend="numpy")
    targets = np.full_like(tokens, -100)
    targets[0, -11:-1] = tokens[0, -10:]
    assert f"→ {model.loss(tokens, targets) / np.log(2):.2f} bits per byte" in told
    assert live.run(TYPED) == OPENING


def test_a_state_of_another_port_goes_on_here(live: Page, tmp_path: Path) -> None:
    model = bdh_spec.load(backend="numpy")
    params, config = bdh_spec.read()
    text = b"The import statement"
    tokens = np.frombuffer(text, np.uint8).astype(np.int64)[None]
    _, state = model.advance(model.init_state(), tokens[:, :-1])
    save_state(tmp_path / "s.safetensors", model.export_state(state), config, fingerprint(params), tokens[:, -1:])
    live.drop(tmp_path / "s.safetensors")
    live.wait("!document.querySelector('#before').hidden")
    assert live.run(TYPED) == "t"
    assert "19 bytes" in live.run("document.querySelector('#before').textContent")
    for name, value in {"bytes": "30", "temperature": "1", "top_k": "0", "seed": "11"}.items():
        live.run(f"document.querySelector('#generate [name={name}]').value = '{value}'")
    live.click("#go")
    live.wait(
        "document.querySelector('#status').textContent.startsWith('31 bytes') && document.querySelector('#stop').disabled"
    )
    assert bytes(live.run(f"[...{TYPED}].map((c) => c.charCodeAt(0) & 0xff)")) == model.generate(text, 30, seed=11)[19:]


def test_the_state_that_the_page_saves_goes_on_elsewhere(live: Page, tmp_path: Path) -> None:
    live.run(
        "URL.createObjectURL = (blob) => { window.saved = blob; return 'data:,'; };"
        " HTMLAnchorElement.prototype.click = () => {}"
    )
    live.click("#save")
    file = live.run(
        "saved.arrayBuffer().then((b) => btoa(Array.from(new Uint8Array(b), (c) => String.fromCharCode(c)).join('')))"
    )
    (tmp_path / "s.safetensors").write_bytes(base64.b64decode(file))
    params, config = bdh_spec.read()
    state, pending = read_state(tmp_path / "s.safetensors", config, fingerprint(params))
    assert bytes(pending[0].tolist()) == OPENING[-1:].encode()
    model = bdh_spec.load(backend="numpy")
    new = [int(token[0]) for token, _ in model.stream(pending, 20, seed=4, state=model.import_state(state))]
    assert OPENING.encode() + bytes(new) == model.generate(OPENING, 20, seed=4)


def test_writing_can_be_stopped(live: Page) -> None:
    live.run("document.querySelector('#generate [name=bytes]').value = 5000")
    live.click("#go")
    live.wait(f"{TYPED}.length > {len(OPENING)}")
    live.click("#stop")
    live.wait(READ)
    kept = live.run(TYPED)
    assert len(OPENING) < len(kept) < 5000
    time.sleep(0.3)
    assert live.run(TYPED) == kept


def test_another_checkpoint_is_dropped_and_wrong_files_get_a_sentence(
    live: Page, small: tuple[Params, BDHConfig], tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("once upon a time there was a file")
    live.drop(tmp_path / "notes.txt")
    live.wait(NOTICE)
    assert "notes.txt is no whole safetensors file" in live.run(NOTICE)
    assert live.run("document.querySelector('#drop').hidden")
    assert "hatchling" in live.run("document.querySelector('#model-name').textContent")
    write_safetensors(tmp_path / "torch.safetensors", {"attn.freqs": np.ones(4, np.float32)}, {})
    live.drop(tmp_path / "torch.safetensors")
    live.wait(f"({NOTICE}).includes('another dialect: convert it with bdh-convert')")
    params, config = small
    large = dict(metadata(config), config=json.dumps(config.as_dict() | {"vocab_size": 300}))
    wide = {"embed": np.zeros((300, 22), np.float32), "lm_head": np.zeros((22, 300), np.float32)}
    write_safetensors(tmp_path / "wide.safetensors", params._asdict() | wide, large)
    live.drop(tmp_path / "wide.safetensors")
    live.wait(f"({NOTICE}).includes('has 300 tokens, and bytes are 256')")
    deep = dict(metadata(config), config=json.dumps(config.as_dict() | {"n_layer": 10**9}))
    write_safetensors(tmp_path / "deep.safetensors", params._asdict(), deep)
    live.drop(tmp_path / "deep.safetensors")
    live.wait(f"({NOTICE}).includes('has 1,000,000,000 layers and a state of')")
    bdh_spec.save(tmp_path / "small.safetensors", params, config)
    live.drop(tmp_path / "small.safetensors")
    live.wait("document.querySelector('#model-name').textContent === 'small.safetensors'")
    live.wait(READ)
    assert live.run(NOTICE) == ""
    assert live.run("document.querySelectorAll('#rasters figure').length") == config.n_layer
    assert live.run(TYPED) == OPENING


@pytest.mark.parametrize("width", [400, 1300])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_off_and_everything_can_be_read(live: Page, width: int, scheme: str) -> None:
    live.look(width, scheme=scheme)
    assert live.run("document.documentElement.scrollWidth") <= width
    cut = "[...document.querySelectorAll('th, td, button:not(.place), h2')].filter((e) => e.scrollWidth > e.clientWidth + 1)"
    assert live.run(f"{cut}.map((e) => e.textContent)") == []
    ratios = live.run(CONTRASTS)
    assert len(ratios) > 40
    assert not [told for told in ratios if told["ratio"] < 4.5], "WCAG's AA"


# The contrast of each text with what lies behind it, where that is one colour.
CONTRASTS = """(() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (c) => c.slice(0, 3).map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => { const c = rgb(getComputedStyle(e).backgroundColor);
    return c.length < 4 || c[3] === 1 ? c : e.parentElement ? behind(e.parentElement) : [255, 255, 255]; };
  const found = [];
  for (const e of document.querySelectorAll('main *, header *, footer *')) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !e.offsetParent || e.closest('#shades, .strip, :disabled, svg, legend + *')) continue;
    const [a, b] = [light(rgb(getComputedStyle(e).color)), light(behind(e))];
    found.push({ text: e.textContent.trim().slice(0, 40), ratio: (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) });
  }
  return found;
})()"""


def test_without_a_checkpoint_the_page_asks_for_one(browser: Page, tmp_path: Path) -> None:
    (tmp_path / "empty.html").write_text(page(), encoding="utf-8")
    browser.open(tmp_path / "empty.html")
    assert browser.run("document.querySelector('#welcome').innerText").startswith("Drop a checkpoint here")
    browser.drop(EMBEDDED)
    browser.wait(READ)
    assert browser.run(TYPED) == OPENING
    assert browser.console == []


def test_the_command_writes_one_page_that_needs_nothing_else(small: tuple[Params, BDHConfig], tmp_path: Path) -> None:
    params, config = small
    bdh_spec.save(tmp_path / "a <b>.safetensors", params, config)
    run = [sys.executable, "-m", "bdh_look", "live", "-c", "a <b>.safetensors", "-o", "live.html"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "live.html\n", "")
    text = (tmp_path / "live.html").read_text(encoding="utf-8")
    assert html.escape("a <b>.safetensors") in text
    assert base64.b64encode((tmp_path / "a <b>.safetensors").read_bytes()).decode() in text
    assert "default-src 'none'" in text
    assert not [line for line in text.splitlines() if "import " in line and ".mjs" in line]
    assert not list(tmp_path.glob("*.part"))


def test_a_page_carries_a_checkpoint_of_any_dialect(small: tuple[Params, BDHConfig], tmp_path: Path) -> None:
    params, config = small
    bdh_spec.save(tmp_path / "m.safetensors", params, config)
    convert = [str(Path(sys.executable).with_name("bdh-convert")), "numpy-to-mlx", "m.safetensors", "-o", "m.npz"]
    subprocess.run(convert, cwd=tmp_path, check=True, capture_output=True)
    assert canonical(tmp_path / "m.npz", *opened(tmp_path / "m.npz")) == (tmp_path / "m.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-c", "nothing.pt"], "nothing.pt does not exist: check the path"),
        (["-c", "x.txt"], "x.txt"),
        (["-o", "x.txt"], "x.txt exists: choose another name or give --force"),
        (["-o", "no/live.html"], "no is not a folder: nothing can be written there"),
        (["-o", "-", "--open"], "a page on stdout is no file for --open to show"),
        (["--empty", "-c", "x.txt"], "--empty leaves the model out, so x.txt would be ignored"),
        (["--empty", "--n-layer", "3"], "--empty leaves the model out, so --n-layer would be ignored"),
        (["--n-layer", "3"], "the embedded model knows its layers, so --n-layer would be ignored"),
        (["--frobnicate"], "No such option"),
    ],
)
def test_misuse_is_one_sentence_and_nothing_is_written(
    arguments: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("a text and no checkpoint")
    monkeypatch.setattr(sys, "argv", ["bdh-look", "live", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("bdh-look: ")
    assert sentence in line
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]
