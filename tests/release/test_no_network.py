"""Nothing here opens a connection, neither when it is imported nor when it runs.

Each command runs with a hook that Python calls before any connection or look-up of a name, in children too; and, where the
machine lets us, in a namespace that has no network at all, where what is no Python would fail as well.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
WITHOUT_NETWORK = ("unshare", "--map-root-user", "--net")

# Python imports a module of this name at every start.
HOOK = """
import os, sys
EVENTS = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.sendto",
          "socket.sendmsg", "urllib.Request")

def hook(event, arguments):
    if event not in EVENTS or (event == "socket.connect" and isinstance(arguments[1], (str, bytes))):  # of this machine
        return
    with open(os.environ["CONNECTIONS"], "a") as log:
        log.write(f"{event} {arguments[1:]}\\n")
    raise OSError("no connection is to be opened")

sys.addaudithook(hook)
"""

PORTS = ("numpy", "torch", "mlx", "jax")
FACE = """
import bdh_transformers, torch
from bdh_transformers import BDHConfig, BDHForCausalLM, BDHTokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
BDHForCausalLM(BDHConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained("face")
BDHTokenizer().save_pretrained("face")
tokenizer = AutoTokenizer.from_pretrained("./face")
model = AutoModelForCausalLM.from_pretrained("./face")
print(model.generate(**tokenizer(["a"], return_tensors="pt"), max_new_tokens=2))
AutoModelForCausalLM.from_pretrained("./face", trust_remote_code=True)
"""
TRAIN = """
import bdh_spec, numpy as np
model = bdh_spec.load(backend=BACKEND)
tokens = np.array([[1, 2, 3, 4]])
model.gradients(tokens, tokens)
model.trace(tokens)
"""

LINES = {
    **{
        f"import {name}": ["python", "-c", f"import {name}"]
        for name in ("bdh_spec", "bdh_convert.cli", "bdh_conformance.cli", "bdh_look.cli")
    },
    **{f"generate {port}": ["bdh-generate", "The ", "--backend", port, "-n", "5"] for port in PORTS},
    **{f"train {port}": ["python", "-c", TRAIN.replace("BACKEND", repr(port))] for port in PORTS},
    "conform numpy": ["bdh-conform", "numpy", "--tier", "smoke", "--channel", "logits", "--dtype", "fp32"],
    "backends": ["bdh-generate", "--backends"],
    "convert": ["bdh-convert", "->hf", "m.safetensors"],
    "look": ["bdh-look", "The dragon", "--backend", "numpy"],
    "inspect": ["bdh-convert", "--inspect", "m.safetensors"],
    "vectors": ["bdh-conform", "vectors", "export", "vectors"],
    "transformers": ["python", "-c", FACE],
}

Guarded = Callable[..., tuple[subprocess.CompletedProcess[str], str]]


def can_do_without() -> bool:
    return (
        shutil.which("unshare") is not None and not subprocess.run([*WITHOUT_NETWORK, "true"], capture_output=True).returncode
    )


@pytest.fixture
def guarded(tmp_path: Path) -> Guarded:
    """Run a command under the hook: what came of it, and the connections that were tried."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)
    log = tmp_path / "connections"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_", "BDH_"))}
    told = {"PYTHONPATH": str(tmp_path / "hook"), "CONNECTIONS": str(log), "HF_HOME": str(tmp_path / "hub")}

    def run(*line: str, through: tuple[str, ...] = ()) -> tuple[subprocess.CompletedProcess[str], str]:
        command = [*through, str(BIN / line[0]), *line[1:]]
        environment = kept | told | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, errors="replace", timeout=300
        )
        return done, log.read_text() if log.exists() else ""

    return run


@pytest.mark.parametrize("line", LINES.values(), ids=LINES.keys())
def test_no_connection_is_opened(line: list[str], guarded: Guarded, tmp_path: Path) -> None:
    shutil.copy(Path(__file__).parents[2] / "bdh_spec" / "checkpoints" / "hatchling.safetensors", tmp_path / "m.safetensors")
    done, connections = guarded(*line, through=WITHOUT_NETWORK if can_do_without() else ())
    assert done.returncode == 0, done.stderr[-3000:]
    assert not connections


@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import urllib.request; urllib.request.urlopen('http://localhost')",
        "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import socket; socket.getaddrinfo(\"a.invalid\", 1)'])",
        "import contextlib, socket\nwith contextlib.suppress(OSError): socket.create_connection(('127.0.0.1', 9))",
        "from huggingface_hub import HfApi; HfApi().model_info('nobody/nothing')",
        pytest.param(  # tries again for half a minute
            "from transformers import AutoConfig; AutoConfig.from_pretrained('nobody/nothing')", marks=pytest.mark.thorough
        ),
    ],
)
def test_the_hook_sees_connections_even_where_their_failure_is_hidden(code: str, guarded: Guarded) -> None:
    assert guarded("python", "-c", code)[1]
