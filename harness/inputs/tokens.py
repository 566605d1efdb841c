"""From a text to tokens, with the model's own tokenizer and no engine."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from ..errors import UsageError
from ..inputs.text import Text
from .corpora import Documents, load_documents, skipped_note
from .token_bytes import token_bytes


def load_tokenizer(model_path: str) -> Any:
    """The tokenizer that vLLM would use.

    Raises:
        UsageError: the model has none that Transformers can load.

    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_path)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"cannot load the tokenizer of {model_path}: {reason}") from None


def tokenize(tokenizer: Any, text: Text) -> list[list[int]]:
    """Token ids by document, without special tokens; one document where they are joined.

    Rows that are left out are told on standard error.

    Raises:
        UsageError: the text cannot be had.

    """
    documents = load_documents(text)
    if documents.skipped_rows:
        print(f"kv-eviction: {skipped_note(text, documents.skipped_rows)}", file=sys.stderr)
    return encode(tokenizer, text.document_mode, documents)


def encode(tokenizer: Any, document_mode: str, documents: Documents) -> list[list[int]]:
    """``tokenize`` of documents that are read already: no file, no network, no import."""
    texts = documents.texts
    if document_mode == "concatenate":
        texts = [documents.separator.join(texts)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer.model_max_length = 1 << 40  # no warning: windows are cut from this
        return [tokenizer(d, add_special_tokens=False).input_ids for d in texts]


def scored_text(tokenizer: Any, window: list[int], min_context: int) -> dict[str, int]:
    """Size of the text that a window's scored tokens stand for.

    Units that do not depend on the tokenizer, so that models of different tokenizers can be
    compared. A word is what white space separates; words cut at an edge count as one each.

    Bytes are UTF-8. Where tokens are bytes, or fall back to bytes (see ``token_bytes``), they are
    those that the scored tokens stand for, exactly, even if a window cuts a character in two.
    With another tokenizer they are what the decoded window has more than its decoded first
    ``min_context`` tokens, which is exact unless a token holds a part of a character.

    Args:
        tokenizer: of Transformers.
        window: token ids, ``[n]``.
        min_context: first token that is scored.

    """
    scored = window[min_context:]
    if (pieces := token_bytes(tokenizer, scored)) is not None:
        size = sum(map(len, pieces))
    else:
        size = _decoded_size(tokenizer, window) - _decoded_size(tokenizer, window[:min_context])
    return {"scored_bytes": size, "scored_words": len(_decoded(tokenizer, scored).split())}


def _decoded(tokenizer: Any, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


def _decoded_size(tokenizer: Any, tokens: list[int]) -> int:
    return len(_decoded(tokenizer, tokens).encode("utf-8"))
