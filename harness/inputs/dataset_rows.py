"""Rows of text that ``datasets`` reads: local files, folders, and names on the hub."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..inputs.text import Text

MAX_CHARACTERS = 20_000_000
"""Enough for any context here; a corpus is read no further."""
LOADERS = {"jsonl": "json", "parquet": "parquet"}
"""Kinds of local files that ``datasets`` reads, and its loader of each."""


@dataclass(frozen=True)
class HubDataset:
    """Where a corpus lies on the hub: arguments of ``datasets.load_dataset``, and the column.

    ``revision``: a commit of the hub's repository; None: the newest, resolved when it is loaded
    and recorded.
    """

    path: str
    name: str | None
    split: str | None
    """None: its test split, or the only one it has."""
    column: str
    revision: str | None
    separator: str = "\n\n"


def read_rows(text: Text, known: HubDataset | None, others: Sequence[str] = ()) -> list[str | None]:
    """The rows of a text's column, null ones included, up to ``MAX_CHARACTERS``.

    Args:
        text: a local file, or a name or folder for ``datasets``.
        known: where ``text`` lies on the hub, if it is a name of this program's own.
        others: names to give instead, for the message.

    Raises:
        UsageError: ``datasets`` cannot load it, it has no such column, or a row of the column
            is no text.

    """
    import datasets

    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    name = known.path if known else text.dataset_path or text.dataset
    if text.dataset_path and Path(name).is_file() and not Path(name).stat().st_size:
        return []  # which ``datasets`` cannot load
    try:
        rows = _load(datasets, text, known, name)
    except Exception as error:
        raise UsageError(
            f"datasets cannot load {name}: {_reason(error)}; give text:FILE, jsonl:FILE, "
            f"parquet:FILE, a dataset's name or folder, or one of: "
            f"{', '.join(others)}"
        ) from None
    if text.column not in rows.column_names:
        raise UsageError(
            f"{name} has no column {text.column!r}; "
            f"name one with --text-column: {', '.join(rows.column_names)}"
        )
    found: list[str | None] = []
    size = 0
    for number, row in enumerate(rows.select_columns(text.column), 1):
        value = row[text.column]
        if value is not None and not isinstance(value, str):
            raise UsageError(
                f"row {number} of {name} holds {type(value).__name__} {value!r:.40} in column "
                f"{text.column!r}, no text; name another column with --text-column: "
                f"{', '.join(rows.column_names)}"
            )
        found.append(value)
        size += len(value or "")
        if size > MAX_CHARACTERS:
            break
    return found


def _reason(error: BaseException) -> str:
    """The first line of what began it: ``datasets`` wraps the errors of its readers."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0]


def _load(datasets: Any, text: Text, known: HubDataset | None, name: str) -> Any:
    kind = text.dataset.partition(":")[0]
    if kind in LOADERS and text.dataset_path:
        return datasets.load_dataset(LOADERS[kind], data_files=text.dataset_path, split="train")
    config, revision = (known.name, text.revision) if known else (None, None)
    split = text.split or split_of(name, config, revision)
    return datasets.load_dataset(name, config, split=split, revision=revision)


def split_of(name: str, config: str | None = None, revision: str | None = None) -> str:
    """A dataset's test split, or the only one it has.

    Raises:
        ValueError: it has several, and none of them is ``test``.

    """
    import datasets

    available = datasets.get_dataset_split_names(name, config, revision=revision)
    if "test" not in available and len(available) > 1:
        raise ValueError(f"it has no test split, but {', '.join(available)}")
    return "test" if "test" in available else available[0]
