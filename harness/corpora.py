"""Texts: the embedded one, local files, and ``datasets`` by name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UsageError
from .packages import cache_folder, fetch_member

DEFAULT_DATASET = "canterbury"
MAX_CHARACTERS = 20_000_000
"""Enough for any context here; a hub corpus is read no further."""

_PACKAGE = "Brotli==1.1.0"
_CANTERBURY = {
    "lcet10.txt": "5314ba1dbb03f471df88bec6cd120a938ef60d0fd3511c5c1dce61bf7463245f",
    "alice29.txt": "7467306ee0feed4971260f3c87421154a05be571d944e9cb021a5713700c38f0",
}


@dataclass(frozen=True)
class HubDataset:
    """Where a corpus lies on the hub: arguments of ``datasets.load_dataset``, and the column."""

    path: str
    name: str | None
    split: str
    column: str
    separator: str = "\n\n"


HUB = {
    # Rows of WikiText are lines that end with their own newline.
    "wikitext": HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text", ""),
    "pg19": HubDataset("emozilla/pg19", None, "test", "text"),
    "arxiv": HubDataset("ccdv/arxiv-summarization", "document", "test", "article"),
}


def load_text(dataset: str) -> str:
    """The text that ``--dataset`` names.

    - ``canterbury``: the two English prose texts of the Canterbury corpus, paragraphs unwrapped:
      ``lcet10`` (proceedings of a Library of Congress workshop, 1992; public domain, and far
      less quoted than any novel) and ``alice29`` (Carroll). 121,000 SmolLM2 tokens. They come
      with the source distribution of ``Brotli``, which carries them as test data under fixed
      hashes, so every machine that reaches a package registry gets the same bytes.
    - ``text:FILE``: a local UTF-8 file, as it is.
    - ``wikitext``, ``pg19``, ``arxiv``, or any name or folder ``datasets`` can load.

    Raises:
        UsageError: the text cannot be had; the message says why.

    """
    if dataset == DEFAULT_DATASET:
        return "\n\n".join(_unwrap(_canterbury(name, _CANTERBURY[name])) for name in _CANTERBURY)
    if dataset.startswith("text:"):
        path = Path(dataset.removeprefix("text:")).expanduser()
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read {path} as UTF-8 text: {error}") from None
    return _from_datasets(HUB.get(dataset, HubDataset(dataset, None, "test", "text")))


def _canterbury(name: str, sha256: str) -> str:
    path = fetch_member(
        _PACKAGE, f"/testdata/{name}", sha256, cache_folder() / "texts" / name, source=True
    )
    return path.read_text(encoding="latin-1")


def _unwrap(text: str) -> str:
    """Hard-wrapped lines joined to paragraphs: line breaks are not prose."""
    paragraphs = re.split(r"\n\s*\n", text.replace("\r\n", "\n"))
    return "\n\n".join(filter(None, (" ".join(paragraph.split()) for paragraph in paragraphs)))


def _from_datasets(source: HubDataset) -> str:
    import datasets

    datasets.utils.logging.set_verbosity_error()
    try:
        rows = _load(datasets, source)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"datasets cannot load {source.path}: {reason}; give text:FILE, a dataset's name "
            f"or folder, or one of: {', '.join((DEFAULT_DATASET, *HUB))}"
        ) from None
    if source.column not in rows.column_names:
        raise UsageError(
            f"{source.path} has no column {source.column!r}; it has: {', '.join(rows.column_names)}"
        )
    pieces: list[str] = []
    size = 0
    for row in rows:
        pieces.append(row[source.column])
        size += len(pieces[-1])
        if size > MAX_CHARACTERS:
            break
    return source.separator.join(pieces)


def _load(datasets: Any, source: HubDataset) -> Any:
    available = datasets.get_dataset_split_names(source.path, source.name)
    split = source.split if source.split in available else available[0]
    return datasets.load_dataset(source.path, source.name, split=split)
