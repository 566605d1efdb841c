"""Which tokens a run sees: from documents and a seed, no clock."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np

from ..errors import UsageError

Window = tuple[int, list[int]]
"""Index of the first token (counted over all documents) and the tokens."""
ALL_WINDOWS = "all"
"""In place of a number of windows: all that tile the text."""


def draw_windows(
    documents: Sequence[Sequence[int]], num_samples: int, context_length: int, seed: int
) -> list[Window]:
    """Windows at random places, without overlap, none across two documents.

    Args:
        documents: tokens by document; one for a text that was joined.
        num_samples: windows to draw.
        context_length: tokens per window.
        seed: of the draw; the same seed gives the same windows everywhere.

    Returns:
        ``num_samples`` windows, in order of place.

    Raises:
        UsageError: the text is too short.

    """
    if num_samples < 1 or context_length < 2:
        raise UsageError("--num-samples must be at least 1 and --context-length at least 2")
    rng = np.random.default_rng(seed)
    fitting = np.array([len(document) // context_length for document in documents])
    if fitting.sum() < num_samples:
        raise UsageError(_too_short(documents, fitting, num_samples, context_length))
    if len(documents) == 1:
        chosen = np.array([num_samples])
    else:
        slots = np.repeat(np.arange(len(documents)), fitting)
        picked = rng.choice(slots, size=num_samples, replace=False)
        chosen = np.bincount(picked, minlength=len(documents))
    windows: list[Window] = []
    offset = 0
    for document, count in zip(documents, chosen.tolist(), strict=True):
        spare = len(document) - count * context_length
        gaps = np.sort(rng.integers(0, spare + 1, size=count))
        for start in (gaps + np.arange(count) * context_length).tolist():
            windows.append((offset + start, list(document[start : start + context_length])))
        offset += len(document)
    return windows


def tile_windows(documents: Sequence[Sequence[int]], context_length: int) -> list[Window]:
    """All windows of a text, one behind the other; what is left at a document's end is in none.

    Args:
        documents: tokens by document; one for a text that was joined.
        context_length: tokens per window.

    Raises:
        UsageError: no document is as long as a window.

    """
    windows: list[Window] = []
    offset = 0
    for document in documents:
        for start in range(0, len(document) - context_length + 1, context_length):
            windows.append((offset + start, list(document[start : start + context_length])))
        offset += len(document)
    if not windows:
        raise UsageError(_too_short(documents, np.zeros(len(documents)), 1, context_length))
    return windows


def _too_short(
    documents: Sequence[Sequence[int]], fitting: np.ndarray, num_samples: int, context_length: int
) -> str:
    if len(documents) == 1 and not fitting.any():
        return (
            f"the text has {len(documents[0]):,} tokens, fewer than one window of "
            f"{context_length:,}; lower --context-length or give a longer text"
        )
    if len(documents) == 1:
        return (
            f"the text has {len(documents[0]):,} tokens, but {num_samples} windows of "
            f"{context_length:,} need {num_samples * context_length:,}; "
            f"lower --num-samples or --context-length"
        )
    return (
        f"{np.count_nonzero(fitting)} of the text's {len(documents)} documents are as long as "
        f"{context_length:,} tokens, and they hold {fitting.sum()} windows, not {num_samples}; "
        f"lower --num-samples or --context-length, or use --document-mode concatenate"
    )


def tokens_sha256(windows: Iterable[Sequence[int]]) -> str:
    """Of the tokens of windows, in their order: who has the same has read the same.

    It is that of the JSON text ``[[1,2],[3,4]]`` without spaces, so that a program that knows
    nothing of this one can compute it.
    """
    text = json.dumps([list(window) for window in windows], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def draw_prompts(
    documents: Sequence[Sequence[int]], num_prompts: int, length: int, seed: int
) -> list[list[int]]:
    """Prompts at random places of all documents in a row; they may overlap.

    Raises:
        UsageError: the text is shorter than one prompt.

    """
    tokens = documents[0] if len(documents) == 1 else list(chain.from_iterable(documents))
    if len(tokens) < length:
        raise UsageError(
            f"the text has {len(tokens):,} tokens, fewer than a prompt of {length:,}; "
            f"lower --context-length"
        )
    starts = np.random.default_rng(seed).integers(0, len(tokens) - length + 1, size=num_prompts)
    return [list(tokens[start : start + length]) for start in starts.tolist()]
