"""bdh-conform: answers on stdout, talk on stderr, exit 0, 1 or 2; and the files it writes."""

import json
import re
import runpy
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from bdh_conformance import __main__ as door
from bdh_conformance import known, report
from bdh_conformance.channels import CHANNELS
from bdh_conformance.files.vectors import Judged, origin
from bdh_conformance.levels import badge, levels
from bdh_conformance.outcomes import Result
from bdh_conformance.plan import TIERS, plan
from bdh_spec import Capabilities
from bdh_spec.dtypes import DTYPES
from bdh_spec.protocol import VERBS
from bdh_spec.rope import frequencies

ROOT = Path(__file__).parents[2]
CASE = "B1 T1 L1 h1 D2 N2 V2 m1 seed=0 scale=20.0"
FAST = ["--tier", "smoke", "--channel", "logits,traces", "--dtype", "float32"]


@pytest.fixture
def conform(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the command line: exit status, stdout, stderr."""
    monkeypatch.chdir(ROOT)

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bdh-conform", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            door.main()
        return int(stopped.value.code or 0), *capsys.readouterr()

    return run


def test_the_version_is_told(conform) -> None:
    assert conform("--version") == (0, f"bdh-conform {version('bdh-spec')}\n", "")
    assert conform("vectors", "--version") == (0, f"bdh-conform vectors {version('bdh-spec')}\n", "")


@pytest.mark.parametrize("word", ["fp64", "F64", "double"])
def test_every_name_of_a_dtype_means_one_thing(conform, word: str) -> None:
    status, out, err = conform("numpy", "--tier", "smoke", "--channel", "logits", "--dtype", word)
    assert status == 0
    assert "numpy passes: 2 passed" in out
    assert all(line.startswith("logits/float64") for line in err.splitlines())


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory):
    """A folder with a module of a port that is wrong."""
    folder = tmp_path_factory.mktemp("planted")
    source = """
from bdh_conformance.adversaries.mistakes import MISTAKES


def wrong():
    return MISTAKES["frequencies_not_paired"].backend()
"""
    (folder / "planted_port.py").write_text(source)
    sys.path.insert(0, str(folder))
    yield "planted_port:wrong"
    sys.path.remove(str(folder))


def test_a_right_port_passes(conform) -> None:
    status, out, err = conform("numpy", *FAST)
    assert status == 0
    assert "numpy passes: 3 passed" in out
    assert all(" passed after " in line for line in err.splitlines())
    assert conform("numpy", *FAST, "--quiet")[2] == ""


def test_a_wrong_port_fails(conform, planted: str) -> None:
    status, out, err = conform(planted, *FAST)
    assert status == 1
    assert "differs from the specification" in out
    assert f"bdh-conform {planted} --channel logits --dtype float32 --case 'B" in out
    assert "and so traces/float32 fails, first at layers.0.rotated" in out
    assert "traces/float32 failed after 1 cases" in err


def test_a_case_can_be_pasted_back(conform, planted: str) -> None:
    case = "B1 T5 L2 h2 D8 m4 V7 seed=7 scale=20"
    assert conform("numpy", "--channel", "logits,decode,gradients", "--case", case)[0] == 0
    status, out, _ = conform(planted, "--channel", "decode", "--dtype", "float32", "--case", case)
    assert status == 1
    assert "--channel decode --dtype float32" in out


@pytest.mark.parametrize(("phase", "ids"), [("exact", {"logits/float32"}), ("float32", {"logits/float32/float32_phases"})])
def test_a_run_can_be_restricted_to_a_phase(conform, tmp_path: Path, phase: str, ids: set[str]) -> None:
    file = tmp_path / "report.json"
    words = ("--tier", "smoke", "--channel", "logits", "--dtype", "float32", "--phase", phase)
    assert conform("numpy", *words, "--json", file)[0] == 0
    assert {check["id"] for check in json.loads(file.read_text())["checks"]} == ids


def test_a_failure_of_float32_phases_names_its_phase(conform, planted: str) -> None:
    _, out, _ = conform(planted, "--tier", "smoke", "--channel", "logits", "--dtype", "float32", "--phase", "float32")
    assert "--channel logits --dtype float32 --phase float32 --case 'B" in out


def test_a_run_that_checked_nothing_fails(conform) -> None:
    status, out, _ = conform("numpy", "--dtype", "bfloat16")
    assert status == 1
    assert "nothing was checked" in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nonesuch"], "no port is named 'nonesuch'"),
        (["no_such_module:Port"], "no_such_module:Port cannot be imported"),
        (["json:Port"], "json:Port leads nowhere"),
        (["json:JSONDecoder"], "json:JSONDecoder is no bdh_spec.Backend"),
        (["numpy", "--dtype", "float8"], "'float8' is none of float32"),
        (["numpy", "--channel", "smell"], "'smell' is none of logits"),
        (["numpy", "--phase", "half"], "Invalid value for '--phase': 'half' is not one of 'exact', 'float32'"),
        (["numpy", "--device", "abacus"], "numpy has no device 'abacus' here"),
        (["numpy", "--case", "B1"], "the case 'B1' lacks"),
        (["numpy", "--case", CASE, "--seed", "1"], "--case looks at one case only, so --seed would be ignored"),
        (["numpy", "--case", CASE, "--tier", "standard"], "--case looks at one case only, so --tier would be ignored"),
        (["numpy", "--in-process", "--time-limit", "3"], "--in-process can end no port, so --time-limit would be ignored"),
        (["numpy", "--in-process", "--memory-limit", "3"], "--in-process can end no port, so --memory-limit would be ignored"),
        (
            ["vectors", "export", "none", "--case", CASE, "--version", "1.0"],
            "--case is no case of a published set, so --version would be ignored",
        ),
        (["vectors", "check", "none", "none", "--dtype", "int4"], "no vectors are in 'int4': there are float32, float64"),
        (["numpy", "--tier", "endless"], "Invalid value for '--tier': 'endless' is not one of"),
        (["numpy", "--baseline", "pyproject.toml"], "pyproject.toml is no report in JSON"),
        (["numpy", "--known", "README.md"], "README.md cannot be read"),
        ([], "Missing argument 'PORT'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_misuse_gets_one_sentence(conform, words: list[str], sentence: str) -> None:
    status, out, err = conform(*words)
    assert status == 2
    assert out == ""
    assert err.startswith(f"bdh-conform: {sentence}")
    assert len(err.splitlines()) == 1


def test_every_file_is_written(conform, tmp_path: Path) -> None:
    paths = {kind: tmp_path / f"report.{kind}" for kind in ("json", "html")}
    paths |= {"junit": tmp_path / "junit.xml", "badge": tmp_path / "badge.json"}
    status, _, _ = conform("numpy", *FAST, *(word for kind, path in paths.items() for word in (f"--{kind}", path)))
    assert status == 0
    found = json.loads(paths["json"].read_text())
    assert found["levels"]["traces"] == "earned"
    assert {check["id"] for check in found["checks"]} == {"logits/float32", "traces/float32", "logits/float32/float32_phases"}
    suite = ElementTree.parse(paths["junit"]).getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("3", "0")
    assert json.loads(paths["badge"].read_text())["message"] == "forward, traces"
    page = paths["html"].read_text()
    assert "numpy" in page
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")


def test_a_table_of_levels_for_a_readme(conform, tmp_path: Path) -> None:
    conform("numpy", *FAST, "--badge", tmp_path / "levels.md")
    assert "| traces | yes |" in (tmp_path / "levels.md").read_text()


def test_the_page_shows_what_differs_and_escapes_it(conform, planted: str, tmp_path: Path) -> None:
    conform(planted, *FAST, "--html", tmp_path / "report.html", "--json", tmp_path / "report.json")
    page = (tmp_path / "report.html").read_text()
    assert "fails</span>" in page
    assert "--case &#39;B" in page
    found = json.loads((tmp_path / "report.json").read_text())
    found["checks"][0]["worst"]["message"] = "<b>bold</b>"
    assert "&lt;b&gt;bold" in report.page(found, [])


def test_a_port_three_times_worse_than_before_is_named(conform, tmp_path: Path) -> None:
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    conform("numpy", *FAST, "--json", before)
    told = json.loads(before.read_text())
    stages = next(check for check in told["checks"] if check["channel"] == "traces")["ratios"]
    stages["embed"] /= 4
    before.write_text(json.dumps(told))
    status, out, _ = conform("numpy", *FAST, "--baseline", before, "--html", after)
    assert status == 0
    assert "since the baseline: traces/float32 embed 4.0 times nearer to its limit" in out
    assert out.count("since the baseline") == 1
    assert '<td class="number">4.0 times</td>' in after.read_text()


def test_known_failures_are_strict(conform, planted: str, tmp_path: Path) -> None:
    file = tmp_path / "known.toml"
    entry = '[[known]]\nid = "{}"\nreason = "theta"\nlink = "https://example.org/1"\n'
    file.write_text("".join(map(entry.format, ("traces/float32", "logits/float32", "logits/float32/float32_phases"))))
    status, out, _ = conform(planted, *FAST, "--known", file)
    assert status == 0
    assert "3 known failure" in out
    status, out, _ = conform("numpy", *FAST, "--known", file)
    assert status == 1
    assert "traces/float32 is known to fail and is passed: remove it from the known failures" in out


def test_a_known_failure_that_was_not_run_is_an_error(tmp_path: Path) -> None:
    complaints = known.excuse([], [known.Known("traces/float8", "a", "b")])
    assert complaints == ["traces/float8 is known to fail and was not run: correct its id or remove it"]


@pytest.mark.parametrize("text", ['[[known]]\nid = "a"\n', '[[known]]\nid = "a"\nreason = ""\nlink = "b"\n', "known = 3 ="])
def test_a_known_failure_needs_a_reason_and_a_link(text: str, tmp_path: Path) -> None:
    (tmp_path / "known.toml").write_text(text)
    with pytest.raises(known.KnownError):
        known.read(tmp_path / "known.toml")


def test_a_level_is_lost_by_one_failure_known_or_not() -> None:
    def result(status: str) -> Result:
        return Result("decode", "decode", "float32", "exact", status)

    assert levels([result("passed"), result("not claimed")])["decode"] == "earned"
    assert levels([result("passed"), result("known failure")])["decode"] == "failed"
    assert levels([result("not claimed")])["decode"] == "not claimed"
    assert levels([])["decode"] == "not checked"
    assert badge("x", levels([result("failed")]), passed=False)["color"] == "red"


def test_the_example_adapter_earns_its_first_level(conform) -> None:
    status, out, _ = conform("examples.minimal_port:MyBackend", "--channel", "logits,batch,mutation,refusals")
    assert status == 0
    assert "mine passes: 4 passed" in out


def test_the_porting_guide_shows_the_example_adapter_and_it_is_short() -> None:
    guide = (ROOT / "conformance" / "PORTING.md").read_text()
    shown = guide.split("```python\n")[1].split("```")[0]
    assert len(shown.splitlines()) <= 50
    source = (ROOT / "examples" / "minimal_port.py").read_text()
    assert shown.split("\n\n\n", 1)[1] in source


def test_the_porting_guide_says_what_smoke_does_not_see() -> None:
    guide = " ".join((ROOT / "conformance" / "PORTING.md").read_text().split())
    unseen = re.search(r"It does not look at ([a-z0-9 ,]+) at all", guide)
    assert unseen is not None
    assert set(re.findall(r"[a-z0-9]+", unseen[1])) - {"and"} == {c.name for c in CHANNELS.values() if not c.smoke}
    checks = plan(TIERS["smoke"], Capabilities(DTYPES, verbs=VERBS))
    cases = [origin(given) if isinstance(given, Judged) else given for check in checks for given in check.fixed]
    assert f"no text of more than {max(case.time for case in cases)} tokens" in guide
    assert f"no row of more than {max(case.config.n_neurons for case in cases)} neurons" in guide
    assert {check.channel.name for check in checks if check.dtype != "float32"} == {"traces"}


def test_the_example_reads_through_a_state(conform) -> None:
    status, out, _ = conform("examples.minimal_port:MyBackend", "--channel", "states,decode,phases", "--tier", "smoke")
    assert status == 0
    assert "decode         │ earned" in out
    assert "long positions │ earned" in out


@pytest.mark.parametrize("neurons", [2, 30, 1000, 8192])
def test_the_example_computes_the_table_to_the_bit(neurons: int) -> None:
    example = runpy.run_path(str(ROOT / "examples" / "minimal_port.py"))
    assert np.array_equal(example["my_frequencies"](neurons), frequencies(neurons))


def test_the_suite_runs_inside_pytest() -> None:
    plugin = ["-p", "bdh_conformance.plugin", "--pyargs", "bdh_conformance.suite", "-p", "no:cacheprovider"]
    words = ["--bdh-backend", "examples.minimal_port:MyBackend", "--bdh-tier", "smoke", "-q", "-rs"]
    done = subprocess.run([sys.executable, "-m", "pytest", *plugin, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "not claimed: the port does not claim the verb trace" in done.stdout
    assert "passed" in done.stdout


@pytest.mark.parametrize("missing", ["hypothesis", "jinja2"])
def test_what_the_extra_would_install_is_named_where_it_is_missing(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from bdh_conformance.start import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "numpy"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"bdh-conform: {missing} is not installed: pip install 'bdh-spec[conformance]'\n"


def inside_pytest(*words: object) -> subprocess.CompletedProcess[str]:
    plugin = ["-p", "bdh_conformance.plugin", "--pyargs", "bdh_conformance.suite", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *plugin, "-q", "--bdh-tier", "smoke", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_pytest_is_told_of_misuse_and_not_of_a_test_that_failed(tmp_path: Path) -> None:
    for words in (["--bdh-backend", "nonesuch"], ["--bdh-backend", "numpy", "--bdh-baseline", ROOT / "README.md"]):
        done = inside_pytest(*words)
        assert done.returncode == pytest.ExitCode.USAGE_ERROR
        assert "Traceback" not in done.stdout + done.stderr


def test_a_failure_inside_pytest_is_one_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "from bdh_conformance.adversaries.mistakes import MISTAKES\ndef wrong(): return MISTAKES['loss_in_bits'].backend()\n"
    )
    (tmp_path / "wrong_port.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = inside_pytest("--bdh-backend", "wrong_port:wrong", "--bdh-channel", "loss", "--bdh-dtype", "float32")
    assert done.returncode == 1
    assert "(loss_in_bits)" in done.stdout
    assert done.stdout.count("FAILED") == 1


def test_a_port_of_float32_phases_alone_passes_smoke(conform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = """
from bdh_spec import Capabilities
from bdh_spec.numpy_backend import NumpyBackend


class Port(NumpyBackend):
    capabilities = Capabilities(("float32",), ("float32",), ("forward", "advance", "loss", "trace", "state"))
"""
    (tmp_path / "older_port.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert conform("older_port:Port", "--tier", "smoke")[0] == 0
