"""A tokenizer for models of bytes: token b is byte b, and special tokens come after the bytes."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import TokenizersBackend

# A conversation in bytes alone: who speaks, what is said, an empty line. An end of its own, if there is one, ends each answer,
# and `generation` marks answers for trainers that learn from nothing else.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- message['role'] | capitalize + ': ' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}
{{- message['content'] -}}
{%- if eos_token and eos_token != pad_token -%}{{- eos_token -}}{%- endif -%}
{%- endgeneration -%}
{%- else -%}
{{- message['content'] -}}
{%- endif -%}
{{- '\\n\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant: ' -}}{%- endif -%}
"""


def alphabet() -> dict[str, int]:
    """The byte behind each character of byte-level BPE: a printable byte is its own, the others count on from 256."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class BDHTokenizer(TokenizersBackend):
    """The bytes of a text as ids 0 to 255; from 256 on bos, eos, pad and other special tokens, those that it is given.

    Texts are padded on the left, where generation needs it. A special token that it was given is one also where a text spells
    it, as trainers do that append eos; ``split_special_tokens=True``, here or in a call, reads its bytes. Where it was given
    none, every text is its bytes: ``<pad>`` written in it is five of them.

    Without an eos of its own padding ends texts, as libraries want some token there. A model learns an end as an id of its own
    by ``eos_token="<eos>"`` and ``model.resize_token_embeddings(len(tokenizer))``.

    >>> BDHTokenizer()("Ġé<pad>")["input_ids"]
    [196, 160, 195, 169, 60, 112, 97, 100, 62]
    >>> BDHTokenizer(eos_token="<eos>")("a<eos>")["input_ids"]
    [97, 256]
    """

    def __init__(
        self,
        vocab: dict[str, int] | None = None,
        pad_token: str | None = "<pad>",
        eos_token: str | None = None,
        padding_side: str = "left",
        split_special_tokens: bool | None = None,
        chat_template: Any = CHAT_TEMPLATE,
        **kwargs: Any,
    ) -> None:
        if vocab not in (None, alphabet()):  # transformers hands over what a tokenizer.json holds
            raise ValueError(
                "tokenizer.json has other tokens than the 256 bytes: name its class in tokenizer_config.json, such as"
                ' "tokenizer_class": "TokenizersBackend"'
            )
        self._tokenizer = Tokenizer(BPE(vocab=alphabet(), merges=[]))
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._tokenizer.decoder = decoders.ByteLevel()
        if split_special_tokens is None:
            split_special_tokens = not is_told_apart({"pad_token": pad_token, "eos_token": eos_token, **kwargs})
        super().__init__(
            pad_token=pad_token,
            eos_token=pad_token if eos_token is None else eos_token,
            padding_side=padding_side,
            split_special_tokens=split_special_tokens,
            chat_template=chat_template,
            **kwargs,
        )

    def add_special_tokens(self, special_tokens_dict: dict[str, Any], *args: Any, **kwargs: Any) -> int:
        """Take in special tokens, which from then on are read where a text spells them."""
        added = super().add_special_tokens(special_tokens_dict, *args, **kwargs)
        if is_told_apart(special_tokens_dict):
            self.split_special_tokens = False
        return added


def is_told_apart(given: dict[str, Any]) -> bool:
    """Whether these special tokens include others than padding, so that texts spell them on purpose."""
    kinds = {name for name, token in given.items() if token and (name.endswith("_token") or name.endswith("_special_tokens"))}
    return bool(kinds - {"pad_token", "split_special_tokens"} - {name for name in kinds if name.startswith("add_")})
