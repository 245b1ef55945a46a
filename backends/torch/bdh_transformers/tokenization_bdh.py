"""A tokenizer for models of bytes: token b is byte b, and special tokens come after the bytes."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import TokenizersBackend


def alphabet() -> dict[str, int]:
    """The byte behind each character of byte-level BPE: a printable byte is its own, the others count on from 256."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class BDHTokenizer(TokenizersBackend):
    """The bytes of a text as ids 0 to 255; from 256 on bos, eos, pad and other special tokens, those that it is given.

    Texts are padded on the left, where generation needs it. ``<pad>`` written in a text is five bytes and no special token,
    and so with all others; ``split_special_tokens=False``, here or in a call, reads them as special tokens.

    >>> BDHTokenizer()("Ġé")["input_ids"]
    [196, 160, 195, 169]
    >>> BDHTokenizer(eos_token="<eos>").eos_token_id
    256
    """

    def __init__(
        self,
        vocab: dict[str, int] | None = None,
        pad_token: str | None = "<pad>",
        padding_side: str = "left",
        split_special_tokens: bool = True,
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
        super().__init__(pad_token=pad_token, padding_side=padding_side, split_special_tokens=split_special_tokens, **kwargs)
