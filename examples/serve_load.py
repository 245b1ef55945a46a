"""How a server does under load, and whether it mixes anything up: N clients at once, each of whom gets the text of his seed.

python examples/serve_load.py --clients 1,8,32 --new 200 checkpoint.safetensors

Starts the server (python -m bdh_transformers.serving) and asks it over HTTP. Without a checkpoint, the small embedded model. A
text that is not the one that its seed writes alone must have parted from it at a draw too close to call, or the run fails.
"""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import psutil
from rich.console import Console
from rich.progress import track
from rich.table import Table

import bdh_spec
from bdh_conformance.channels.sampling import part
from bdh_conformance.yardstick.tolerances import FACTOR
from bdh_spec.protocol import Model
from bdh_spec.sampling import Sampling

PROMPTS = ("The ", "A class that", "def read(self", "Return the number of", "If the file does not exist, ", "When a module is")


class Client(NamedTuple):
    """What one client asks for: the number of a client is the seed of his text."""

    number: int
    new: int

    @property
    def prompt(self) -> str:
        """What his text goes on from."""
        return PROMPTS[self.number % len(PROMPTS)]

    @property
    def how(self) -> Sampling:
        """How his text is drawn."""
        return Sampling(0.8, 50, self.number)

    def ask(self, port: int, name: str) -> str:
        """What the server writes for him."""
        how = {"temperature": self.how.temperature, "top_k": self.how.top_k, "seed": self.how.seed}
        body = json.dumps({"model": name, "prompt": self.prompt, "max_tokens": self.new, **how})
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("POST", "/v1/completions", body)
        answer = json.load(connection.getresponse())
        connection.close()
        return str(answer["choices"][0]["text"])

    def alone(self, model: Model) -> bytes:
        """What a model writes of this seed."""
        return model.generate(self.prompt, self.new, self.how.temperature, self.how.top_k, self.how.seed)

    def is_too_close(self, reference: Model, text: str) -> bool:
        """Whether a text parts from that of the specification at a draw that rounding may decide."""
        expected = np.frombuffer(self.alone(reference), np.uint8).astype(int)
        written = np.frombuffer(self.prompt.encode() + text.encode(), np.uint8).astype(int)
        if len(written) != len(expected):
            return False  # bytes that are no text cannot be had back
        if (written == expected).all():
            return True
        found = part(reference, expected, written, 0, self.how)
        return found.gap <= FACTOR["float32"] * found.rounding


@click.command()
@click.argument("checkpoint", required=False, type=click.Path(exists=True, path_type=Path))
@click.option("--clients", default="1,8,32", show_default=True, help="How many at once, in turn.")
@click.option("--new", default=200, show_default=True, help="Tokens that each text has.")
@click.option("--device", default="cpu", show_default=True)
def main(checkpoint: Path | None, clients: str, new: int, device: str) -> None:
    """Measure the server of CHECKPOINT under the load of so many clients at once."""
    counts = [int(count) for count in clients.split(",")]
    words = [str(checkpoint)] if checkpoint else []
    command = [sys.executable, "-m", "bdh_transformers.serving", "--port", "0", "--device", device, *words]
    command += ["--places", str(max(counts)), "--name", "model"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    said = ""
    for line in server.stderr:  # of which the first may be of a library that it imports
        said += line
        if address := re.search(r"http://[^:]+:(\d+)/v1: \d+ texts at once, ([\d.]+) MB each", line):
            break
    else:
        sys.exit(said)
    try:
        wrong = measure(int(address[1]), float(address[2]), psutil.Process(server.pid), counts, new, checkpoint)
    finally:
        server.terminate()
        server.communicate()
    sys.exit(bool(wrong))


def measure(port: int, state: float, server: psutil.Process, counts: list[int], new: int, checkpoint: Path | None) -> int:
    """Show a table; how many texts were wrong."""
    talk, table = (
        Console(stderr=True),
        Table("clients", "tokens/s", "tokens/s of CPU", "MB per client", "texts alone alike", "too close", "wrong"),
    )
    model = bdh_spec.load(checkpoint, backend="torch", device="cpu")
    reference = bdh_spec.load(checkpoint, backend="numpy", dtype="float64")
    Client(0, 8).ask(port, "model")  # what the first text of all takes, it takes once
    idle, wrong = server.memory_info().rss, 0
    for count in counts:
        crowd = [Client(number, new) for number in range(count)]
        cpu, start = sum(server.cpu_times()[:2]), time.perf_counter()
        with ThreadPoolExecutor(count) as many:
            texts = [many.submit(client.ask, port, "model") for client in crowd]
            most = idle
            while not all(text.done() for text in texts):
                most = max(most, server.memory_info().rss)
                time.sleep(0.02)
        seconds, cpu = time.perf_counter() - start, sum(server.cpu_times()[:2]) - cpu
        pairs = list(zip(crowd, (text.result() for text in texts), strict=True))
        others = [
            (client, text)
            for client, text in track(pairs, f"texts of {count} clients alone", console=talk)
            if client.alone(model)[len(client.prompt) :].decode("utf-8", "replace") != text
        ]
        close = sum(client.is_too_close(reference, text) for client, text in others)
        wrong += len(others) - close
        measured = (most - idle) / 1e6 / count
        row = (count, f"{count * new / seconds:.0f}", f"{count * new / cpu:.0f}", f"{measured:.1f} (a state: {state:.1f})")
        table.add_row(*map(str, row), str(count - len(others)), str(close), str(len(others) - close))
    Console(width=110).print(table)
    return wrong


if __name__ == "__main__":
    main()
