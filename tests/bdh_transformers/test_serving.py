"""The server as its clients meet it: a process on a port, asked by many at once, some of whom leave, and some are wrong."""

from __future__ import annotations

import http.client
import json
import queue
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from openai import APIStatusError, OpenAI

import bdh_spec
from bdh_transformers import BDHConfig, BDHForCausalLM, ContinuousBatch
from bdh_transformers.serving.__main__ import main
from bdh_transformers.serving.asked import Completion, RefusalError, understood
from bdh_transformers.serving.writer import Choice, Piece, Writer

PLACES, QUEUE = 3, 9
# float64, so that rounding cannot part a text from that of its seed.
OPTIONS = ["--dtype", "float64", "--places", str(PLACES), "--queue", str(QUEUE), "--max-tokens", "100000", "--chunk", "16"]
PROMPT = "The dragon"


class Served(NamedTuple):
    """A server that runs."""

    process: subprocess.Popen[str]
    port: int

    def end(self) -> tuple[int, str]:
        """The status with which it has ended, and what it said."""
        _, talk = self.process.communicate(timeout=60)
        return self.process.returncode, talk

    def client(self) -> OpenAI:
        """OpenAI's own client."""
        return OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0)

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, Any, dict[str, str]]:
        """The status of an answer, what it holds, and its headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read()), dict(answer.headers)
        finally:
            connection.close()

    def begun(self, **wish: Any) -> socket.socket:
        """A connection that has sent a request for a text, and has read of no answer."""
        body = json.dumps({"model": "hatchling", "prompt": PROMPT, **wish}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(head.encode() + body)
        return connection

    def refuses(self) -> bool:
        """Whether connections come to be refused."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=60).close()
            except ConnectionRefusedError:
                return True
            time.sleep(0.02)
        return False

    def counts(self) -> tuple[int, int]:
        """How many texts are asked for, and how many are written."""
        health = self.ask("GET", "/health")[1]
        return health["asked"], health["writing"]

    def until(self, counts: tuple[int, int]) -> None:
        """Wait until so many are."""
        end = time.monotonic() + 60
        while self.counts() != counts:
            assert time.monotonic() < end, (self.counts(), counts)
            time.sleep(0.02)


def start(*options: str) -> Served:
    """A server on a port of its own."""
    command = [sys.executable, "-m", "bdh_transformers.serving", "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = ""
    for line in process.stderr:  # of which the first may be what torchao tells whoever imports transformers
        said += line
        if address := re.search(r"http://127\.0\.0\.1:(\d+)/v1", line):
            return Served(process, int(address[1]))
    pytest.fail(f"the server has ended without an address: {said}")


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    """One that all tests ask that leave it as it was."""
    served = start(*OPTIONS)
    yield served
    assert served.counts() == (0, 0)
    served.process.terminate()
    status, talk = served.end()
    assert (status, talk.replace("WARNING:  Invalid HTTP request received.\n", "")) == (0, "")  # one test sends what is none


@cache
def reference() -> Any:
    """The same model by the specification."""
    return bdh_spec.load(backend="numpy", dtype="float64")


def alone(prompt: str, new: int, temperature: float = 1.0, top_k: int | None = None, seed: int = 0) -> str:
    """What the specification writes after a prompt."""
    text = reference().generate(prompt, new, temperature, top_k, seed)
    return bytes(text[len(prompt.encode()) :]).decode("utf-8", "replace")


def test_r14_many_clients_at_once_get_each_the_text_of_his_seed(server: Served) -> None:
    prompts = ["The ", PROMPT, "x", "A class with a method that returns a value" * 3]

    def ask(i: int) -> tuple[str, str]:
        prompt, new, seed = prompts[i % 4], 20 + 7 * (i % 3), i // 2  # every seed twice, with other prompts
        options: Any = {"temperature": 0.8, "seed": seed, "max_tokens": new, "stream": i % 2 == 1}
        given = server.client().completions.create(model="hatchling", prompt=prompt, extra_body={"top_k": 50}, **options)
        parts = given if i % 2 else [given]
        return "".join(part.choices[0].text for part in parts), alone(prompt, new, 0.8, 50, seed)

    with ThreadPoolExecutor(PLACES + QUEUE) as many:
        found = list(many.map(ask, range(PLACES + QUEUE)))
    assert [text for text, _ in found] == [expected for _, expected in found]
    assert len({text for text, _ in found}) == len(found)


def conversation(text: str) -> str:
    """A conversation of one message as the tokenizer spells it."""
    return f"User: {text}\n\nAssistant: "


def test_a_conversation_is_answered_whole_and_in_pieces(server: Served) -> None:
    said: list[Any] = [{"role": "user", "content": "what hatches?"}]
    expected = alone(conversation("what hatches?"), 30, seed=3)
    create = server.client().chat.completions.create
    whole = create(model="hatchling", messages=said, seed=3, max_completion_tokens=30, user="me", presence_penalty=0)
    assert (whole.choices[0].message.role, whole.choices[0].message.content) == ("assistant", expected)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(conversation("what hatches?")), 30)
    said = [{"role": "user", "content": [{"type": "text", "text": "what "}, {"type": "text", "text": "hatches?"}]}]
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    first, *parts, last = create(model="hatchling", messages=said, seed=3, max_tokens=30, **options)
    assert first.choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == expected
    assert parts[-1].choices[0].finish_reason == "length"
    assert last.usage == whole.usage


def test_settings_are_those_of_the_specification(server: Served) -> None:
    create: Any = server.client().completions.create
    greedy = alone(PROMPT, 40, temperature=0)
    for options in ({"temperature": 0}, {"top_p": 0}, {"extra_body": {"top_k": 1}}):
        assert create(model="hatchling", prompt=PROMPT, max_tokens=40, seed=1, **options).choices[0].text == greedy
    rows = reference().generate(bdh_spec.protocol.as_tokens(PROMPT).repeat(2, axis=0), 12, seed=5)[:, len(PROMPT) :]
    several = create(model="hatchling", prompt=[PROMPT], max_tokens=12, seed=5, n=2)
    assert [each.text for each in several.choices] == [bytes(row.tolist()).decode("utf-8", "replace") for row in rows]
    both = create(model="hatchling", prompt=[list(b"The "), list(PROMPT.encode())], max_tokens=12, seed=5)
    assert [each.text for each in both.choices] == [alone(prompt, 12, seed=5) for prompt in ("The ", PROMPT)]
    assert [each.index for each in both.choices] == [0, 1]
    assert (both.usage.prompt_tokens, both.usage.completion_tokens) == (4 + len(PROMPT), 24)
    fresh = {create(model="hatchling", prompt=PROMPT, max_tokens=30).choices[0].text for _ in range(2)}
    assert len(fresh) == 2  # without a seed every text is a new one


def test_a_text_ends_before_a_stop(server: Served) -> None:
    text = alone(PROMPT, 60, 0.8, 50, 2)
    stop = text[25:28]
    expected = text[: text.index(stop)]
    options: Any = {"temperature": 0.8, "seed": 2, "max_tokens": 60, "extra_body": {"top_k": 50}}
    for given in (stop, ["never written", stop]):
        for stream in (False, True):
            parts = server.client().completions.create(model="hatchling", prompt=PROMPT, stop=given, stream=stream, **options)
            found = [part.choices[0] for part in (parts if stream else [parts])]
            assert "".join(each.text for each in found) == expected
            assert found[-1].finish_reason == "stop"


def test_models_are_listed(server: Served) -> None:
    assert [each.id for each in server.client().models.list()] == ["hatchling"]
    assert server.client().models.retrieve("hatchling").object == "model"
    with pytest.raises(APIStatusError, match="no model is named 'other' here") as refused:
        server.client().models.retrieve("other")
    assert (refused.value.status_code, refused.value.code) == (404, "model_not_found")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place_and_spoils_nothing(server: Served, stream: bool) -> None:
    gone = [server.begun(max_tokens=100000, stream=stream, seed=seed) for seed in range(PLACES + 1)]
    server.until((PLACES + 1, PLACES))
    if stream:
        assert b"data: " in gone[0].recv(1000)
    for connection in gone[:2]:
        connection.close()
    server.until((PLACES - 1, PLACES - 1))
    answer = server.client().completions.create(model="hatchling", prompt=PROMPT, seed=9, max_tokens=20)
    assert answer.choices[0].text == alone(PROMPT, 20, seed=9)
    for connection in gone[2:]:
        connection.close()
    server.until((0, 0))


def test_who_finds_the_queue_full_is_told_to_come_again(server: Served) -> None:
    held = [server.begun(max_tokens=100000, stream=True) for _ in range(PLACES + QUEUE)]
    server.until((PLACES + QUEUE, PLACES))
    wish = json.dumps({"model": "hatchling", "prompt": PROMPT}).encode()
    status, answer, headers = server.ask("POST", "/v1/completions", wish)
    assert (status, answer["error"]["code"], headers["retry-after"]) == (429, "queue_full", "1")
    for connection in held:
        connection.close()
    server.until((0, 0))
    assert server.ask("POST", "/v1/completions", wish)[0] == 200


WRONG: list[tuple[bytes, int, str | None, str]] = [
    (b"{", 400, None, "Invalid JSON"),
    (b"", 400, None, "Invalid JSON"),
    (b"\xff", 400, None, "Invalid JSON"),
    (b"[]", 400, None, "an object"),
    (b'{"prompt": "a"}', 400, "model", "required"),
    (b'{"model": "other", "prompt": "a"}', 404, "model", "no model is named 'other' here: there is 'hatchling'"),
    *(
        (b'{"model": "hatchling", ' + body + b"}", 400, param, message)
        for body, param, message in (
            (b'"max_tokens": 3', "prompt", "prompt: give a text"),
            (b'"prompt": 5', "prompt", "prompt: give a text"),
            (b'"prompt": [1, "a"]', "prompt", "prompt: give a text"),
            (b'"prompt": [true]', "prompt", "prompt: give a text"),
            (b'"prompt": "\\ud800"', None, "Invalid JSON"),
            (b'"prompt": ""', "prompt", "at least one token"),
            (b'"prompt": []', "prompt", "0 texts"),
            (b'"prompt": [256]', "prompt", "token 256 at [0, 0] is outside the vocabulary of 256"),
            (b'"prompt": [-1]', "prompt", "token -1"),
            (b'"prompt": "a", "temperature": -1', "temperature", "greater than or equal to 0"),
            (b'"prompt": "a", "temperature": NaN', "temperature", "finite"),
            (b'"prompt": "a", "temperature": "1"', "temperature", "valid number"),
            (b'"prompt": "a", "top_p": 1.1', "top_p", "less than or equal to 1"),
            (b'"prompt": "a", "top_k": -1', "top_k", "greater than or equal to 0"),
            (b'"prompt": "a", "seed": 18446744073709551616', "seed", "less than"),
            (b'"prompt": "a", "max_tokens": 0', "max_tokens", "greater than or equal to 1"),
            (b'"prompt": "a", "max_tokens": 100001', "max_tokens", "at most 100000"),
            (b'"prompt": "a", "n": 4', "n", "4 texts: ask for 1 to 3 at once"),
            (b'"prompt": "a", "stop": 3', "stop", "stop: give a text or a list of texts"),
            (b'"prompt": "a", "logprobs": 2', "logprobs", "no such setting"),
            (b'"prompt": "a", "stream": "yes"', "stream", "valid boolean"),
        )
    ),
]


@pytest.mark.parametrize(("body", "status", "param", "message"), WRONG, ids=[body.decode("latin-1") for body, *_ in WRONG])
def test_a_request_that_is_wrong_is_refused_in_openai_s_words(
    server: Served, body: bytes, status: int, param: str | None, message: str
) -> None:
    found, answer, _ = server.ask("POST", "/v1/completions", body)
    assert found == status
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert (answer["error"]["type"], answer["error"]["param"]) == ("invalid_request_error", param)
    assert message in answer["error"]["message"]


def test_conversations_that_are_wrong_are_refused(server: Served) -> None:
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    for messages in ([], [{"role": "nobody", "content": "x"}], [{"role": "user"}], [{"role": "user", "content": image}], "x"):
        body = json.dumps({"model": "hatchling", "messages": messages}).encode()
        status, answer, _ = server.ask("POST", "/v1/chat/completions", body)
        assert (status, answer["error"]["param"]) == (400, "messages")


def test_what_is_nowhere_is_refused_and_so_is_what_is_too_long(server: Served) -> None:
    assert server.ask("GET", "/v1/nothing")[0] == 404
    assert server.ask("GET", "/v1/completions")[0] == 405
    long = json.dumps({"model": "hatchling", "prompt": "x" * 2**20}).encode()
    status, answer, _ = server.ask("POST", "/v1/completions", long)
    assert (status, answer["error"]["message"]) == (413, "the request is longer than 1048576 bytes")
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    connection.sendall(b"what is this?\r\n\r\n")
    assert connection.recv(100).startswith(b"HTTP/1.1 400")
    connection.close()


def test_sigterm_lets_texts_end_and_takes_no_more() -> None:
    served = start(*OPTIONS)
    try:
        stream = served.client().completions.create(model="hatchling", prompt=PROMPT, seed=1, max_tokens=300, stream=True)
        text = next(stream).choices[0].text
        served.process.send_signal(signal.SIGTERM)
        assert served.refuses()
        text += "".join(part.choices[0].text for part in stream)
        assert text == alone(PROMPT, 300, seed=1)
        assert served.end() == (0, "")
    finally:
        served.process.kill()
        served.end()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["nowhere"], "'nowhere' does not exist"),
        ([__file__], "test_serving.py"),
        (["--places", "0"], "'--places'"),
        (["--dtype", "int3"], "no dtype 'int3' here"),
        (["--device", "abacus"], "no device 'abacus' here"),
        (["--host", "256.0.0.1"], "256.0.0.1"),
    ],
    ids=str,
)
def test_misuse_gets_one_sentence(
    options: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["serving", *options])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    answer, talk = capsys.readouterr()
    assert answer == ""
    assert talk.startswith("serving: ")
    assert talk.count("\n") == 1
    assert sentence in talk


# What is shown of a text, without a server.


def choice(most: int = 100, stops: tuple[bytes, ...] = (), ends: frozenset[int] = frozenset()) -> Choice:
    """A text of which nothing was written yet."""
    wish = Completion(model="m", prompt="p", seed=0)
    return Choice(0, [65], wish, 0, most, stops, ends, SimpleNamespace())  # type: ignore[arg-type]  # nobody waits


def shown(text: Choice, tokens: bytes | list[int]) -> list[Piece]:
    """The pieces of a text, up to its end."""
    pieces = []
    for token in tokens:
        pieces.append(text.take(token))
        if pieces[-1].reason:
            break
    return pieces


def test_a_letter_of_several_bytes_is_shown_once_it_is_whole() -> None:
    pieces = shown(choice(9), "aé龍x".encode() + b"\xe2\x82")
    assert [piece.text for piece in pieces] == ["a", "", "é", "", "", "龍", "x", "", "\ufffd"]
    assert pieces[-1].reason == "length"


@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        ((b"stop",), b"do not sto here, stop", "do not sto here, "),
        ((b"aab",), b"aaaab", "aa"),
        ((b"cd", b"bcdx"), b"abcd", "ab"),
        ((b"bcd", b"cd"), b"abcd", "a"),
        (("é".encode(),), "caffé".encode(), "caff"),
        ((b"x",), b"x", ""),
    ],
)
def test_nothing_of_a_stop_is_shown(stops: tuple[bytes, ...], text: bytes, expected: str) -> None:
    pieces = shown(choice(stops=stops), text + b"more")
    assert "".join(piece.text for piece in pieces) == expected
    assert pieces[-1].reason == "stop"
    held = shown(choice(len(text) - 1, stops), text[:-1])
    assert "".join(piece.text for piece in held) == text[:-1].decode("utf-8", "replace")


def test_a_token_that_ends_texts_is_not_shown_and_other_special_ones_are_nothing() -> None:
    pieces = shown(choice(ends=frozenset({257})), [65, 256, 66, 257, 67])
    assert ["".join(piece.text for piece in pieces), pieces[-1].reason, len(pieces)] == ["AB", "stop", 4]


def test_settings_that_ask_for_nothing_are_let_pass() -> None:
    idle = {"logprobs": None, "echo": False, "best_of": 1, "logit_bias": {}, "frequency_penalty": 0.0, "user": "me", "n": None}
    wish = understood(Completion, json.dumps({"model": "m", "prompt": "p", **idle}).encode())
    assert (wish.n, wish.prompts) == (1, ["p"])
    for name, value in {"best_of": 2, "echo": True, "suffix": "x", "logit_bias": {"5": 1}}.items():
        with pytest.raises(RefusalError, match=f"{name}: this server has no such setting"):
            understood(Completion, json.dumps({"model": "m", "prompt": "p", name: value}).encode())


# The thread that writes, without a server.


@pytest.fixture
def model() -> BDHForCausalLM:
    """A small model that has learned nothing."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_internal_dim_multiplier": 4}
    return BDHForCausalLM(BDHConfig(**sizes)).eval()


@pytest.fixture
def writer(model: BDHForCausalLM) -> Iterator[tuple[Writer, queue.Queue[list[tuple[Choice, Piece]]]]]:
    """A thread that writes two texts at once, and what it delivers."""
    delivered: queue.Queue[list[tuple[Choice, Piece]]] = queue.Queue()
    thread = Writer(ContinuousBatch(model), 2, delivered.put)
    thread.start()
    yield thread, delivered
    thread.orders.put(("end", None))
    thread.join(60)
    assert not thread.is_alive()


def test_who_waits_may_leave_and_who_left_may_leave_again(writer: Any) -> None:
    thread, delivered = writer
    texts = [choice(50) for _ in range(4)]
    for text in texts:
        thread.orders.put(("join", text))
    for text in (texts[3], texts[0], texts[0]):
        thread.orders.put(("leave", text))
    ended = set()
    while len(ended) < 2:
        ended |= {which for which, piece in delivered.get(timeout=60) if piece.reason}
    assert ended == set(texts[1:3])
    assert [text.tokens for text in texts[1:3]] == [50, 50]
    assert not texts[3].tokens


def test_a_text_that_diverges_is_an_error_of_its_own(writer: Any, model: BDHForCausalLM) -> None:
    thread, delivered = writer
    model.backbone.embed.weight.data[66] = torch.nan
    good, bad = choice(5, ends=frozenset(range(256))), choice(5)
    bad.prompt = [66]
    thread.orders.put(("join", bad))
    [(which, piece)] = delivered.get(timeout=60)
    assert which is bad
    assert piece.error is not None
    assert "diverged" in piece.error
    thread.orders.put(("join", good))
    [(which, piece)] = delivered.get(timeout=60)
    assert (which, piece.reason) == (good, "stop")


def test_a_model_that_fails_is_told_to_all(model: BDHForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    delivered: queue.Queue[list[tuple[Choice, Piece]]] = queue.Queue()
    thread = Writer(ContinuousBatch(model), 2, delivered.put)
    monkeypatch.setattr(model, "forward", lambda *_, **__: 1 / 0)
    thread.start()
    thread.orders.put(("join", choice()))
    assert delivered.get(timeout=60) == []
    thread.join(60)
    assert isinstance(thread.failure, ZeroDivisionError)
