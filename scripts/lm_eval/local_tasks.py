"""The two tasks' files: prompts and passages from a text, the same for the same seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from planned import NEEDLE, PASSAGES

from harness.errors import UsageError
from harness.inputs.tasks.haystack import Haystack
from harness.inputs.tasks.registry import Asked, draw_samples
from harness.inputs.tasks.sample import AFTER
from harness.inputs.windows import draw_windows
from harness.records.files import write_text

GENERATOR = "niah_single"
"""RULER's single needle; see ``harness/inputs/tasks/needles.py``."""
_MARGIN = 16
"""Tokens left free behind a passage: lm-eval's prefix, the token it has made, and those by which
a text differs when it is encoded again."""


def needle_rows(
    tokenizer: Any, documents: Sequence[Sequence[int]], num: int, length: int, seed: int
) -> list[dict[str, Any]]:
    """Prompts that hide a number, with the number and the prompt's tokens.

    Args:
        tokenizer: of Transformers.
        documents: tokens by document.
        num: prompts to draw.
        length: tokens of a prompt and its answer, at most.
        seed: of the draw.

    Raises:
        UsageError: the text is too short.

    """
    asked = Asked(num, length, AFTER, 0)
    samples = draw_samples(GENERATOR, tokenizer, Haystack(tokenizer, documents), asked, seed)
    return [
        {
            "prompt": tokenizer.decode(sample.prompt, skip_special_tokens=True),
            "answer": sample.expected[0],
            "tokens": len(sample.prompt),
        }
        for sample in samples
    ]


def passage_rows(
    tokenizer: Any, documents: Sequence[Sequence[int]], num: int, length: int, seed: int
) -> list[dict[str, Any]]:
    """Passages that share no token, each with the number of its tokens.

    Args: see ``needle_rows``; ``length`` is a passage's with lm-eval's prefix and one token more.

    Raises:
        UsageError: the text is too short.

    """
    if length <= 2 * _MARGIN:
        raise UsageError(f"--context-length {length} leaves no passage; raise it")
    haystack = Haystack(tokenizer, documents)
    windows = draw_windows(documents, num, length - _MARGIN, seed)
    texts = [haystack.decoded(window) for _, window in windows]
    rows = [
        {"text": text, "tokens": len(tokenizer(text, add_special_tokens=False).input_ids)}
        for text in texts
    ]
    if (longest := max(row["tokens"] for row in rows)) > length - 2:
        raise UsageError(
            f"a passage has {longest} tokens when it is encoded again, and lm-eval would split it; "
            "choose another --seed"
        )
    return rows


def write_tasks(
    folder: Path,
    tokenizer: Any,
    documents: Sequence[Sequence[int]],
    num: int,
    length: int,
    seed: int,
) -> dict[str, str]:
    """Write the tasks' files into ``folder``; the SHA-256 of each, by task."""
    made = {
        NEEDLE: needle_rows(tokenizer, documents, num, length, seed),
        PASSAGES: passage_rows(tokenizer, documents, num, length, seed),
    }
    return {task: _write(folder / f"{task}.jsonl", rows) for task, rows in made.items()}


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    write_text(path, text)
    return hashlib.sha256(text.encode()).hexdigest()
