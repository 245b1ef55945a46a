"""The routes of the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from bdh_spec import BDHError
from bdh_spec.checks import check_tokens
from bdh_transformers.batching import ContinuousBatch
from bdh_transformers.serving.answers import AsMessage, AsText, Usage, event
from bdh_transformers.serving.asked import Chat, Completion, RefusalError, Wish, understood
from bdh_transformers.serving.writer import Choice, Piece, Writer

PATIENCE = 30.0  # seconds that a client may take to send a request


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
        self.started = int(time.time())
        self.when_broken: Callable[[], None] = lambda: None

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
    gone = asyncio.ensure_future(request.receive())  # after the body nothing comes but that the client has gone
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


async def refused(request: Request, refusal: RefusalError) -> Response:
    return JSONResponse(refusal.body, refusal.status, refusal.headers)


async def unknown(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(RefusalError(error.status_code, message).body, error.status_code, error.headers)


async def broken(request: Request, error: Exception) -> Response:
    return JSONResponse(RefusalError(500, "the server failed: its log says why").body, 500)


def as_list(ids: Any) -> list[Any]:
    """Ids of ends, of which a configuration has none, one or several."""
    return ids if isinstance(ids, list) else [ids]
