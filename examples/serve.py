"""A server of OpenAI's completions: one model, any number of clients, and one batch that texts join and leave at any step.

python examples/serve.py checkpoint.safetensors --port 8000

Needs uvicorn and starlette: pip install 'bdh-spec[serve]'. It knows no passwords and listens on this machine alone unless told
otherwise: what faces a network belongs behind a proxy that asks for them.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import queue
import signal
import socket
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
import torch
import uvicorn
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from transformers import AutoModelForCausalLM, AutoTokenizer

import bdh_spec
from bdh_spec import BDHError
from bdh_spec.checks import check_tokens
from bdh_spec.dtypes import dtype_name
from bdh_spec.sampling import Sampling, fresh_seed
from bdh_transformers import BDHConfig, BDHForCausalLM, BDHTokenizer, ContinuousBatch
from bdh_transformers.batching import Text, state_bytes

MISUSE, INTERRUPTED = 2, 130
BYTES = 256  # ids below are bytes, and special tokens come after them
PATIENCE = 30.0  # seconds that a client may take to send a request


# What a client asks for.

IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}  # of no effect on a text
NOTHING: tuple[Any, ...] = (None, False, 0, "", [], {})
SEVERAL = {
    "prompt": "give a text, a list of texts, the token ids of a text, or a list of such",
    "stop": "give a text or a list of texts",
}
USUAL: dict[str, Any] = {"best_of": 1, "response_format": {"type": "text"}, "tool_choice": "none"}


class Known(BaseModel):
    """What has these fields and no others, of these types as they are."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_for_nothing(cls, given: Any) -> Any:
        """Clients send settings of which they want nothing: null, which is the default, and features that are off."""
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if not (value is None or cls._is_idle(name, value))}

    @classmethod
    def _is_idle(cls, name: str, value: Any) -> bool:
        return name not in cls.model_fields and (name in IGNORED or value in NOTHING or value == USUAL.get(name))


class StreamOptions(Known):
    """What a stream tells besides the text."""

    include_usage: bool = False


class Wish(Known):
    """How a text is to be written, whatever it goes on from."""

    model: str
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(0, ge=0)
    seed: int = Field(default_factory=fresh_seed, ge=0, lt=2**64)
    n: int = Field(1, ge=1)
    stop: str | list[str] = Field([], max_length=1000)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @property
    def stops(self) -> tuple[bytes, ...]:
        """The bytes at which a text ends."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop
        return tuple(stop.encode() for stop in given if stop)


class Completion(Wish):
    """A request to /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int = Field(16, ge=1)

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each text to go on from."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]  # type: ignore[list-item]  # numbers are of one prompt, and no list of prompts mixes kinds
        return list(self.prompt)  # type: ignore[arg-type]  # the same


class Part(Known):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Known):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str = ""

    def as_template_takes_it(self) -> dict[str, str]:
        """Its role and its text."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class Chat(Wish):
    """A request to /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)  # its older name


class RefusalError(Exception):
    """An answer in OpenAI's form that is none."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, {} if after is None else {"Retry-After": str(after)}
        kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def understood(kind: type[Wish], body: bytes) -> Any:
    """The request that a body holds."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = [str(word) for word in first["loc"]]
        told = "this server has no such setting" if first["type"] == "extra_forbidden" else first["msg"]
        if where and where[0] in SEVERAL:
            where, told = where[:1], SEVERAL[where[0]]
        raise RefusalError(400, f"{'.'.join(where) or 'the request'}: {told}", param=where[0] if where else None) from error


# What a client gets.


@dataclass
class Piece:
    """Some more of a text; with a reason, the last of it."""

    index: int
    text: str
    reason: Literal["stop", "length"] | None = None
    error: str | None = None


@dataclass(eq=False)
class Choice:
    """A text that a client waits for: what it goes on from, how it is written, and what of it may be shown."""

    index: int
    prompt: list[int]
    wish: Wish
    row: int
    most: int
    stops: tuple[bytes, ...]
    ends: frozenset[int]
    to: asyncio.Queue[Piece]
    tokens: int = 0
    held: bytes = b""  # what may turn out to be the beginning of a stop
    text: Text | None = None
    decoder: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    @property
    def how(self) -> Sampling:
        """How tokens are drawn (R14)."""
        return Sampling(self.wish.temperature, self.wish.top_k, self.wish.seed)

    def take(self, token: int) -> Piece:
        """One more token of the text."""
        self.tokens += 1
        if token in self.ends:
            return self._last(self.held, "stop")
        self.held += bytes([token]) if token < BYTES else b""
        if found := [at for stop in self.stops if (at := self.held.find(stop)) >= 0]:
            return self._last(self.held[: min(found)], "stop")
        if self.tokens == self.most:
            return self._last(self.held, "length")
        sure = len(self.held) - max((overlap(self.held, stop) for stop in self.stops), default=0)
        shown, self.held = self.held[:sure], self.held[sure:]
        return Piece(self.index, self.decoder.decode(shown))

    def _last(self, shown: bytes, reason: Literal["stop", "length"]) -> Piece:
        return Piece(self.index, self.decoder.decode(shown, final=True), reason)


def overlap(text: bytes, stop: bytes) -> int:
    """How many of a text's last bytes are the first ones of a stop."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Writer(threading.Thread):
    """The one thread that uses the model: it writes all texts that there are places for, and lets the others wait."""

    def __init__(self, batch: ContinuousBatch, places: int, deliver: Callable[[list[tuple[Choice, Piece]]], None]) -> None:
        super().__init__(name="writer", daemon=True)
        self.batch, self.places, self.deliver = batch, places, deliver
        self.orders: queue.SimpleQueue[tuple[str, Choice | None]] = queue.SimpleQueue()
        self.waiting: deque[Choice] = deque()
        self.writing: dict[Text, Choice] = {}
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            while self._obey():
                while self.waiting and len(self.writing) < self.places:
                    choice = self.waiting.popleft()
                    choice.text = self.batch.join(choice.prompt, choice.how, top_p=choice.wish.top_p, row=choice.row)
                    self.writing[choice.text] = choice
                if pieces := [self._piece(*drawn) for drawn in self.batch.step()]:
                    self.deliver(pieces)
        except BaseException as error:  # noqa: BLE001  whatever it is, nobody writes any more, and all who wait must know
            self.failure = error
            self.deliver([])

    def _obey(self) -> bool:
        """Carry out what was ordered, if nothing else is to be done the next one that will be; False at the end."""
        while not self.orders.empty() or not (self.writing or self.waiting):
            order, choice = self.orders.get()
            if choice is None:
                return False
            if order == "join":
                self.waiting.append(choice)
            else:
                self._drop(choice)
        return True

    def _drop(self, choice: Choice) -> None:
        if choice in self.waiting:
            self.waiting.remove(choice)
        if choice.text is not None and self.writing.pop(choice.text, None):
            self.batch.leave(choice.text)

    def _piece(self, text: Text, token: Any) -> tuple[Choice, Piece]:
        choice = self.writing[text]
        piece = choice.take(token) if isinstance(token, int) else Piece(choice.index, "", error=str(token))
        if piece.reason or piece.error:
            self._drop(choice)
        return choice, piece


@dataclass
class Limits:
    """How much this server takes upon itself."""

    places: int
    queue: int
    max_tokens: int
    max_body: int


class Service:
    """The routes of the server."""

    def __init__(self, model: Any, tokenizer: Any, name: str, chunk: int, limits: Limits) -> None:
        self.model, self.tokenizer, self.name, self.chunk, self.limits = model, tokenizer, name, chunk, limits
        ends = {tokenizer.eos_token_id, *as_list(model.generation_config.eos_token_id)} - {None}
        self.ends = frozenset(end for end in ends if end < model.config.vocab_size)
        self.asked: set[Choice] = set()  # and not yet answered
        self.started, self.when_broken = int(time.time()), lambda: None

    def app(self) -> Starlette:
        """The application."""
        routes = [
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.models),
            Route("/health", self.health),
        ]
        handlers: dict[Any, Any] = {RefusalError: refused, HTTPException: unknown, Exception: broken}
        return Starlette(routes=routes, exception_handlers=handlers, lifespan=self.lifespan)

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """The writer lives as long as the application."""
        loop = asyncio.get_running_loop()

        def deliver(pieces: list[tuple[Choice, Piece]]) -> None:
            with suppress(RuntimeError):  # the loop has ended, and nobody waits
                loop.call_soon_threadsafe(self._deliver, pieces)

        self.writer = Writer(ContinuousBatch(self.model, chunk=self.chunk), self.limits.places, deliver)
        self.writer.start()
        yield
        self.writer.orders.put(("end", None))
        await asyncio.to_thread(self.writer.join)

    def _deliver(self, pieces: list[tuple[Choice, Piece]]) -> None:
        for choice, piece in pieces:
            choice.to.put_nowait(piece)
        if self.writer.failure is not None:
            for choice in self.asked:
                choice.to.put_nowait(Piece(choice.index, "", error=f"the model failed: {self.writer.failure}"))
            self.when_broken()

    async def models(self, request: Request) -> Response:
        """What there is: one model."""
        wanted = request.path_params.get("name")
        model = {"id": self.name, "object": "model", "created": self.started, "owned_by": "bdh-spec"}
        if wanted is None:
            return JSONResponse({"object": "list", "data": [model]})
        self._demand(wanted)
        return JSONResponse(model)

    async def health(self, request: Request) -> Response:
        """How many texts are written and wait."""
        counts = {"asked": len(self.asked), "writing": len(self.writer.writing), "places": self.limits.places}
        return JSONResponse({"status": "ok", **counts})

    async def completions(self, request: Request) -> Response:
        """Texts that go on from prompts."""
        wish = understood(Completion, await self._body(request))
        prompts = [self.tokenizer(each)["input_ids"] if isinstance(each, str) else each for each in wish.prompts]
        return await self._answer(request, wish, prompts, wish.max_tokens, wish.stops, AsText(self.name))

    async def chat(self, request: Request) -> Response:
        """The next message of a conversation."""
        wish = understood(Chat, await self._body(request))
        messages = [message.as_template_takes_it() for message in wish.messages]
        prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        most = wish.max_completion_tokens or wish.max_tokens or self.limits.max_tokens
        # A model that has learned no end goes on with what its conversations go on with.
        stops = wish.stops if self.ends else (*wish.stops, b"\n\nUser:", b"\n\nSystem:")
        return await self._answer(request, wish, [prompt], most, stops, AsMessage(self.name))

    async def _answer(
        self, request: Request, wish: Any, prompts: list[list[int]], most: int, stops: tuple[bytes, ...], form: AsText
    ) -> Response:
        self._demand(wish.model)
        choices = self._admitted(wish, prompts, most, stops)
        used = Usage(sum(map(len, prompts)), choices)
        if wish.stream:
            return EventStream(self._events(choices, used, form, wish), lambda: self._dismiss(choices))
        texts = [""] * len(choices)
        reasons = [""] * len(choices)
        try:
            async for piece in pieces_until_gone(request, choices):
                texts[piece.index] += piece.text
                reasons[piece.index] = piece.reason or ""
        except ClientDisconnect:
            return Response(status_code=499)  # which nobody reads
        finally:
            self._dismiss(choices)
        said = [form.choice(i, *each) for i, each in enumerate(zip(texts, reasons, strict=True))]
        return JSONResponse({**form.head(), "choices": said, "usage": used.told()})

    def _admitted(self, wish: Any, prompts: list[list[int]], most: int, stops: tuple[bytes, ...]) -> list[Choice]:
        """The texts of a request, in the hands of the writer; or a refusal."""
        limits, many = self.limits, len(prompts) * wish.n
        if self.writer.failure is not None:
            raise RefusalError(503, "the model failed: this server is about to end")
        if not prompts or many > limits.places:
            raise RefusalError(400, f"{many} texts: ask for 1 to {limits.places} at once", param="n" if prompts else "prompt")
        if most > limits.max_tokens:
            raise RefusalError(400, f"max_tokens is {most}: this server writes at most {limits.max_tokens}", param="max_tokens")
        for prompt in prompts:
            try:
                check_tokens(np.array([prompt] if prompt else np.zeros((1, 0), int)), self.model.config.sizes)
            except BDHError as error:
                raise RefusalError(400, str(error), param="prompt") from error
        if len(self.asked) + many > limits.places + limits.queue:
            raise RefusalError(429, "all places are taken, and the queue is full: ask again later", code="queue_full", after=1)
        to: asyncio.Queue[Piece] = asyncio.Queue()
        choices = [Choice(i, prompts[i // wish.n], wish, i % wish.n, most, stops, self.ends, to) for i in range(many)]
        for choice in choices:
            self.asked.add(choice)
            self.writer.orders.put(("join", choice))
        return choices

    def _dismiss(self, choices: list[Choice]) -> None:
        for choice in choices:
            self.asked.discard(choice)
            self.writer.orders.put(("leave", choice))

    async def _events(self, choices: list[Choice], used: Usage, form: AsText, wish: Wish) -> AsyncIterator[str]:
        """Server-sent events: each piece as it is written."""
        try:
            for choice in choices if form.opens else []:
                yield event(form.chunk(choice.index, None, None))
            async for piece in pieces_of(choices):
                if piece.text or piece.reason:
                    yield event(form.chunk(piece.index, piece.text, piece.reason))
            if wish.stream_options.include_usage:
                yield event({**form.head(part=True), "choices": [], "usage": used.told()})
            yield "data: [DONE]\n\n"
        except RefusalError as refusal:
            yield event(refusal.body)

    def _demand(self, name: str) -> None:
        if name != self.name:
            raise RefusalError(
                404, f"no model is named {name!r} here: there is {self.name!r}", param="model", code="model_not_found"
            )

    async def _body(self, request: Request) -> bytes:
        """What was sent, if it is not too much and does not take too long."""
        body, most = bytearray(), self.limits.max_body
        try:
            async with asyncio.timeout(PATIENCE):
                async for part in request.stream():
                    body += part
                    if len(body) > most:
                        raise RefusalError(413, f"the request is longer than {most} bytes")
        except TimeoutError:
            raise RefusalError(408, f"the request was not sent within {PATIENCE:.0f} seconds") from None
        return bytes(body)


class EventStream(StreamingResponse):
    """Server-sent events, after which something is done: also where the client has gone before the first."""

    def __init__(self, events: AsyncIterator[str], at_end: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.at_end = at_end

    async def __call__(self, *asgi: Any) -> None:
        try:
            await super().__call__(*asgi)
        finally:
            self.at_end()


async def pieces_of(choices: list[Choice]) -> AsyncIterator[Piece]:
    """The pieces of all texts as they come, until the last one has ended."""
    left = len(choices)
    while left:
        piece = await choices[0].to.get()
        if piece.error:
            raise RefusalError(500, piece.error)
        left -= piece.reason is not None
        yield piece


async def pieces_until_gone(request: Request, choices: list[Choice]) -> AsyncIterator[Piece]:
    """The same, as long as the client is there."""
    gone = asyncio.create_task(request.receive())  # after the body nothing comes but that the client has gone
    pieces = pieces_of(choices)
    try:
        while True:
            following = asyncio.ensure_future(anext(pieces))
            await asyncio.wait({following, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not following.done():
                following.cancel()
                raise ClientDisconnect
            yield await following
    except StopAsyncIteration:
        pass
    finally:
        gone.cancel()


class Usage:
    """How many tokens a request took."""

    def __init__(self, prompt: int, choices: list[Choice]) -> None:
        self.prompt, self.choices = prompt, choices

    def told(self) -> dict[str, int]:
        """As OpenAI tells it."""
        new = sum(choice.tokens for choice in self.choices)
        return {"prompt_tokens": self.prompt, "completion_tokens": new, "total_tokens": self.prompt + new}


class AsText:
    """Answers of /v1/completions."""

    kinds = ("text_completion", "text_completion")
    prefix = "cmpl"
    opens = False

    def __init__(self, model: str) -> None:
        self.id, self.created, self.model = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time()), model

    def head(self, part: bool = False) -> dict[str, Any]:
        """What stands in every answer, and in every part of one."""
        return {"id": self.id, "object": self.kinds[part], "created": self.created, "model": self.model}

    def choice(self, index: int, text: str, reason: str | None) -> dict[str, Any]:
        """A whole text."""
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}

    def chunk(self, index: int, text: str | None, reason: str | None) -> dict[str, Any]:
        """A piece of a text."""
        return {**self.head(part=True), "choices": [self.choice(index, text or "", reason)]}


class AsMessage(AsText):
    """Answers of /v1/chat/completions."""

    kinds = ("chat.completion", "chat.completion.chunk")
    prefix = "chatcmpl"
    opens = True

    def choice(self, index: int, text: str, reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": reason}

    def chunk(self, index: int, text: str | None, reason: str | None) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""} if text is None else {"content": text} if text else {}
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**self.head(part=True), "choices": [choice]}


def event(body: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(body)}\n\n"


async def refused(request: Request, refusal: RefusalError) -> Response:
    return JSONResponse(refusal.body, refusal.status, refusal.headers)


async def unknown(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(RefusalError(error.status_code, message).body, error.status_code, error.headers)


async def broken(request: Request, error: Exception) -> Response:
    return JSONResponse(RefusalError(500, "the server failed: its log says why").body, 500)


# The command.


def as_list(ids: Any) -> list[Any]:
    """Ids of ends, of which a configuration has none, one or several."""
    return ids if isinstance(ids, list) else [ids]


def read(checkpoint: Path | None) -> tuple[BDHForCausalLM, Any]:
    """A model and its tokenizer: from a folder of transformers, from a file of any dialect, or the embedded one."""
    if checkpoint is not None and (checkpoint / "config.json").is_file():
        model = AutoModelForCausalLM.from_pretrained(checkpoint, local_files_only=True)
        has_tokenizer = (checkpoint / "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True) if has_tokenizer else BDHTokenizer()
    else:
        params, config = bdh_spec.read(checkpoint)
        model, tokenizer = BDHForCausalLM(BDHConfig.from_sizes(config)), BDHTokenizer()
        body, weights = model.backbone, params._replace(lm_head=params.lm_head.T)
        own = (body.embed.weight, body.encoder, body.encoder_v, body.decoder, model.lm_head.weight)
        for weight, value in zip(own, weights, strict=True):
            weight.data.copy_(torch.from_numpy(np.array(value, np.float32)))
    if not isinstance(model, BDHForCausalLM) or not isinstance(tokenizer, BDHTokenizer):
        raise click.UsageError(
            f"{checkpoint} has a {type(model).__name__} and a {type(tokenizer).__name__}: this server writes bytes, by a"
            " BDHForCausalLM and a BDHTokenizer"
        )
    return model, tokenizer


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("checkpoint", required=False, type=click.Path(path_type=Path, exists=True))
@click.option("--host", default="127.0.0.1", help="The address to listen at.")
@click.option("--port", default=8000, type=click.IntRange(0, 65535), help="0 takes any that is free.")
@click.option("--name", help="What clients call the model.  [default: the checkpoint's name]")
@click.option("--device", default="cpu", help="Such as cpu or cuda.")
@click.option("--dtype", default="float32", help="Of the weights.")
@click.option("--places", default=32, type=click.IntRange(1), help="Texts that are written at once.")
@click.option("--queue", "waiting", default=64, type=click.IntRange(0), help="Texts that may wait for a place.")
@click.option("--chunk", default=256, type=click.IntRange(1), help="Tokens of prompts that are read between two of a text.")
@click.option("--max-tokens", default=4096, type=click.IntRange(1), help="The longest text that is written.")
@click.option("--max-body", default=2**20, type=click.IntRange(1), help="The longest request, in bytes.")
@click.option("--drain", default=30, type=click.IntRange(0), help="Seconds that texts may go on after SIGTERM or Ctrl-C.")
def command(
    checkpoint: Path | None,
    host: str,
    port: int,
    name: str | None,
    device: str,
    dtype: str,
    places: int,
    waiting: int,
    chunk: int,
    max_tokens: int,
    max_body: int,
    drain: int,
) -> None:
    """Serve CHECKPOINT, a file or folder of any dialect; without one the small embedded model."""
    model, tokenizer = read(checkpoint)
    model = model.to(device, getattr(torch, dtype_name(dtype))).eval()
    name = name or (checkpoint.resolve().stem if checkpoint else "hatchling")
    service = Service(model, tokenizer, name, chunk, Limits(places, waiting, max_tokens, max_body))
    listening = socket.create_server((host, port))
    config = uvicorn.Config(service.app(), log_level="warning", timeout_graceful_shutdown=drain, lifespan="on")
    server = uvicorn.Server(config)
    service.when_broken = lambda: setattr(server, "should_exit", True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # which uvicorn raises again once all texts have ended
    address = f"http://{host}:{listening.getsockname()[1]}/v1"
    size = state_bytes(model.config) / 1e6
    print(f"{name} at {address}: {places} texts at once, {size:.1f} MB each", file=sys.stderr, flush=True)
    server.run(sockets=[listening])
    if service.writer.failure is not None:
        raise service.writer.failure


def main() -> None:
    """Run the command: bad input is one sentence on stderr and exit status 2."""
    try:
        command.main(standalone_mode=False)
    except (click.ClickException, BDHError, OSError) as error:
        print(f"serve: {error.format_message() if isinstance(error, click.ClickException) else error}", file=sys.stderr)
        sys.exit(MISUSE)
    except (KeyboardInterrupt, click.Abort):
        print("serve: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
