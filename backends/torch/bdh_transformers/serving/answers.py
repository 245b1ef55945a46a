"""The forms of OpenAI's answers."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from bdh_transformers.serving.writer import Choice


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
