"""Commands without their start-up: one process has imported what most of them import, and forks for each that is typed.

What runs is the command's own function, with the words, folder, environment, input and outputs of whoever typed it, in a
process of its own whose exit status is handed on. ``Commands`` has the folder to put first on PATH. On macOS, whose own
libraries bear no fork, that is the folder of the commands as they are installed.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

IMPORTED = (
    *("bdh_convert.command", "bdh_generate.cli", "bdh_train.cli", "bdh_train.loop", "bdh_look.cli", "bdh_look.page"),
    *("bdh_conformance.__main__", "bdh_torch.backend", "matplotlib.figure", "matplotlib.backends.backend_agg"),
)
TYPED = """#!{python} -SE
import json, os, socket, sys
to = socket.socket(socket.AF_UNIX)
to.connect({address!r})
said = {{"name": {name!r}, "words": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}
socket.send_fds(to, [b"x"], [0, 1, 2])
to.sendall(json.dumps(said).encode() + b"\\n")
sys.exit(int(to.recv(16) or b"70"))
"""


class Commands:
    """A folder with every command of this project, each a few lines that ask the process that forks."""

    def __init__(self) -> None:
        self.held = tempfile.TemporaryDirectory()
        self.process: subprocess.Popen[bytes] | None = None
        if sys.platform == "darwin":
            self.folder = Path(sys.executable).parent
            return
        self.folder = Path(self.held.name)
        address = str(self.folder / "socket")
        for point in ours():
            command = self.folder / point
            command.write_text(TYPED.format(python=sys.executable, address=address, name=point))
            command.chmod(0o755)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([sys.executable, __file__, address], env=environment)
        deadline = time.monotonic() + 120
        while not Path(address).exists():
            assert self.process.poll() is None, "what forks has ended"
            assert time.monotonic() < deadline, "what forks does not come up"
            time.sleep(0.02)

    def close(self) -> None:
        if self.process:
            self.process.terminate()
            self.process.wait(30)
        self.held.cleanup()


def ours() -> dict[str, Any]:
    """The console scripts of this project."""
    return {point.name: point for point in entry_points(group="console_scripts") if point.name.startswith("bdh-")}


def serve(address: str) -> None:
    """Fork for each command that is typed, until the process is ended."""
    for name in IMPORTED:
        import_module(name)
    points = ours()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for what waits for a command
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address + ".new")
    listening.listen(64)
    Path(address + ".new").rename(address)
    while True:
        asking, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            wait_for(asking, points)
        asking.close()


def wait_for(asking: socket.socket, points: dict[str, Any]) -> None:
    """Run what is asked for in a process, and tell its exit status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, files, _, _ = socket.recv_fds(asking, 1, 3)
    with asking.makefile("rb") as said:
        asked = json.loads(said.readline())
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        with suppress(OSError):
            asking.sendall(str(code if code >= 0 else 128 - code).encode())
        os._exit(0)
    asking.close()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    # Python's own are about the files that were there before, which could be sought in, or could not.
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode) for number, mode in enumerate("rww"))
    os._exit(run(asked, points))


def run(asked: dict[str, Any], points: dict[str, Any]) -> int:
    """The command, as its script calls it."""
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.argv = [asked["name"], *asked["words"]]
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    try:
        code = points[asked["name"]].load()()
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001  # whatever it is, the process ends with it, as Python would
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    return code or 0


if __name__ == "__main__":
    serve(sys.argv[1])
