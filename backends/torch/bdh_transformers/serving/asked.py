"""What clients ask for, and how they are refused."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bdh_spec.sampling import fresh_seed

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
    def prompts(self) -> list[Any]:
        """Each text to go on from, or its ids."""
        is_one = isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int))
        return [self.prompt] if is_one else list(self.prompt)


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
