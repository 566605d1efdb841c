"""The bytes that single tokens stand for, also where a token holds a part of a character."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


def token_bytes(tokenizer: Any, tokens: Sequence[int]) -> list[bytes] | None:
    """The bytes of each token, which joined are the text's in UTF-8.

    Known of two kinds of vocabularies, told by the tokenizer's decoder: byte-level BPE (GPT-2 and
    after it Llama 3, Qwen, SmolLM2), whose tokens are bytes, and SentencePiece with byte fallback
    (Llama 2, Gemma), whose tokens are characters, or single bytes of rare ones.

    Args:
        tokenizer: of Transformers.
        tokens: ids, ``[n]``.

    Returns:
        ``[n]``; None for a tokenizer of another kind.

    """
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return None
    # Like this a decoder of ``tokenizers`` tells its settings without the vocabulary.
    bytes_of = _bytes_of(bytes(decoder.__getstate__()))
    if bytes_of is None:
        return None
    return [bytes_of(token) for token in tokenizer.convert_ids_to_tokens(list(tokens))]


@cache
def _bytes_of(state: bytes) -> Callable[[str], bytes] | None:
    """From a token as the vocabulary spells it to its bytes, by the decoder's state."""
    settings = json.loads(state)
    steps = settings["decoders"] if settings["type"] == "Sequence" else [settings]
    kinds = {step["type"] for step in steps}
    if kinds == {"ByteLevel"}:
        return _byte_level
    # What joins tokens (Fuse) or strips the text's edge (Strip) changes no token of a window.
    if "ByteFallback" in kinds and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        replaced = [
            (s["pattern"].get("String"), s["content"]) for s in steps if s["type"] == "Replace"
        ]
        if all(pattern for pattern, _ in replaced):
            return lambda token: _with_fallback(token, replaced)
    return None


def _byte_level(token: str) -> bytes:
    # An added token may hold characters that stand for no byte; it is spelt as it is then.
    if not all(character in _BYTES for character in token):
        return token.encode()
    return bytes(_BYTES[character] for character in token)


def _with_fallback(token: str, replaced: list[tuple[str, str]]) -> bytes:
    if match := _FALLBACK.fullmatch(token):
        return bytes.fromhex(match[1])
    for pattern, content in replaced:
        token = token.replace(pattern, content)
    return token.encode()


def _alphabet() -> dict[str, int]:
    """Byte-level BPE's characters for bytes (GPT-2's ``bytes_to_unicode``): printable ones of
    Latin-1 stand for themselves, the others, in order, for 256 and what follows."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {
        chr(256 + place): value for place, value in enumerate(others)
    }


_BYTES = _alphabet()
