"""A model goes to a hub and comes back: the whole of it over HTTP, to a server on this machine that holds what a hub would."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from bdh_transformers.remote_code import files

COMMIT = "0123456789abcdef0123456789abcdef01234567"

PUSH = """
import torch
from bdh_transformers import BDHConfig, BDHForCausalLM, BDHTokenizer

torch.manual_seed(3)
sizes = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, mlp_internal_dim_multiplier=4)
model = BDHForCausalLM(BDHConfig(**sizes, vocab_size=257)).eval()
model.push_to_hub("me/bdh")
tokenizer = BDHTokenizer(eos_token="<eos>")
tokenizer.push_to_hub("me/bdh")
"""
# Where this package is not imported, and the folder's own code is run.
PULL = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("me/bdh", trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained("me/bdh", trust_remote_code=True)
assert "bdh_transformers" not in sys.modules, "the code must come from the hub"
"""
SAVE = """
ids = tokenizer("The dragon<eos>", return_tensors="pt")["input_ids"]
with torch.no_grad():
    torch.save({"ids": ids, "logits": model(ids).logits}, %r)
"""


class Hub(ThreadingHTTPServer):
    """What a hub keeps of one repository."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}  # by their hash, as git-lfs uploads them
        self.unknown: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answers(BaseHTTPRequestHandler):
    """The part of a hub's interface that goes with a model."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing is said."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path, hub = self.path.split("?")[0], self.server
        if path == "/api/repos/create":
            self.say({"url": f"{hub.address}/me/bdh", "id": "me/bdh"})
        elif path == "/api/models/me/bdh/preupload/main":
            kinds = [("lfs" if f["path"].endswith(".safetensors") else "regular", f["path"]) for f in json.loads(body)["files"]]
            self.say({"files": [{"path": name, "uploadMode": kind, "shouldIgnore": False} for kind, name in kinds]})
        elif path == "/me/bdh.git/info/lfs/objects/batch":
            wanted = [(one["oid"], one["size"]) for one in json.loads(body)["objects"]]
            objects = [
                {"oid": oid, "size": size, "actions": {"upload": {"href": f"{hub.address}/blobs/{oid}"}}}
                for oid, size in wanted
            ]
            self.say({"transfer": "basic", "objects": objects}, "application/vnd.git-lfs+json")
        elif path == "/api/models/me/bdh/commit/main":
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.blobs[value["oid"]]
            self.say({"commitUrl": f"{hub.address}/me/bdh/commit/{COMMIT}", "commitOid": COMMIT, "hookOutput": ""})
        elif path == "/api/validate-yaml":
            self.say({"errors": [], "warnings": []})
        else:
            self.missing(path)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        name = self.path.rsplit("/", 1)[1]
        assert hashlib.sha256(body).hexdigest() == name
        self.server.blobs[name] = body
        self.say({})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, hub = self.path.split("?")[0], self.server
        start = f"/me/bdh/resolve/{'main' if '/main/' in path else COMMIT}/"
        if path.startswith("/api/models/me/bdh/tree/"):
            self.say([{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in hub.files.items()])
        elif path.startswith("/api/models/me/bdh"):
            self.say({"id": "me/bdh", "sha": COMMIT, "siblings": [{"rfilename": name} for name in hub.files]})
        elif path.startswith(start) and path.removeprefix(start) in hub.files:
            data = hub.files[path.removeprefix(start)]
            tag = f'"{hashlib.sha256(data).hexdigest()}"'
            self.reply(200, data, {"ETag": tag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"})
        elif path.startswith(start):
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        else:
            self.missing(path)

    def missing(self, path: str) -> None:
        self.server.unknown.append(f"{self.command} {path}")
        self.reply(404, b"{}", {})

    def say(self, answer: Any, kind: str = "application/json") -> None:
        self.reply(200, json.dumps(answer).encode(), {"Content-Type": kind})

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub on this machine."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def run(code: str, hub: Hub, home: Path) -> str:
    """A program that knows this hub alone, and starts with an empty cache."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    own = {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_TOKEN": "hf_none", "HF_HUB_DISABLE_XET": "1"}
    environment = kept | own | {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + "\n".join(hub.unknown)
    return done.stdout


def test_what_was_pushed_comes_back_with_its_code_and_computes_the_same(hub: Hub, tmp_path: Path) -> None:
    run(PUSH + SAVE % str(tmp_path / "pushed"), hub, tmp_path / "here")
    assert set(hub.files) >= {
        "model.safetensors",
        "config.json",
        "tokenizer_config.json",
        "tokenizer.json",
        "README.md",
        *files(),
    }
    assert hub.blobs  # weights are no text
    run(PULL + SAVE % str(tmp_path / "pulled"), hub, tmp_path / "there")
    assert not hub.unknown
    pushed, pulled = torch.load(tmp_path / "pushed"), torch.load(tmp_path / "pulled")
    assert torch.equal(pushed["ids"], pulled["ids"])
    assert torch.equal(pushed["ids"][0], torch.tensor([*b"The dragon", 256]))
    assert torch.equal(pushed["logits"], pulled["logits"])
