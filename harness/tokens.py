"""From a text to tokens, with the model's own tokenizer and no engine."""

from __future__ import annotations

import warnings
from typing import Any

from .corpora import load_documents
from .errors import UsageError
from .specification import Text


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

    Raises:
        UsageError: the text cannot be had.

    """
    return encode(tokenizer, text.document_mode, *load_documents(text))


def encode(
    tokenizer: Any, document_mode: str, documents: list[str], separator: str
) -> list[list[int]]:
    """``tokenize`` of documents that are read already: no file, no network, no import."""
    if document_mode == "concatenate":
        documents = [separator.join(documents)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer.model_max_length = 1 << 40  # no warning: windows are cut from this
        return [tokenizer(d, add_special_tokens=False).input_ids for d in documents]


def scored_text(tokenizer: Any, window: list[int], min_context: int) -> dict[str, int]:
    """Size of the text that a window's scored tokens stand for.

    Units that do not depend on the tokenizer, so that models of different tokenizers can be
    compared. A word is what white space separates; words cut at an edge count as one each.
    """
    text = tokenizer.decode(window[min_context:], clean_up_tokenization_spaces=False)
    return {"scored_bytes": len(text.encode("utf-8")), "scored_words": len(text.split())}
