"""Texts: the embedded one, local files, and ``datasets`` by name, all as documents."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

from ..errors import UsageError
from ..inputs.text import Text
from .dataset_rows import LOADERS, HubDataset, read_rows, split_of
from .packages import cache_folder, fetch_member

DEFAULT_DATASET = "canterbury"
DOCUMENT_MODES = ("concatenate", "whole")

_PACKAGE = "Brotli==1.1.0"
_CANTERBURY = {
    "lcet10.txt": "5314ba1dbb03f471df88bec6cd120a938ef60d0fd3511c5c1dce61bf7463245f",
    "alice29.txt": "7467306ee0feed4971260f3c87421154a05be571d944e9cb021a5713700c38f0",
}
_FILES = ("text", *LOADERS)
"""Kinds of local files."""


HUB = {
    # Rows of WikiText are lines that end with their own newline.
    "wikitext": HubDataset(
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        "test",
        "text",
        "b08601e04326c79dfdd32d625aee71d232d685c3",
        "",
    ),
    "pg19": HubDataset(
        "emozilla/pg19", None, "test", "text", "c021754c8e01c5b1cc83a1f549c1f97fbbb756b8"
    ),
    "arxiv": HubDataset(
        "ccdv/arxiv-summarization",
        "document",
        "test",
        "article",
        "240aaf1a969b3f8cd0ade6986bfad0cd730ee288",
    ),
}
_ARTICLE = re.compile(r"(?m)^(?= = [^=\n][^\n]* = $)")


def describe(dataset: str, column: str | None, document_mode: str) -> Text:
    """What ``--dataset`` names, as far as it can be told without a network.

    Raises:
        UsageError: a local file cannot be read.

    """
    kind, _, path = dataset.partition(":")
    if kind in _FILES and path:
        file = Path(path).expanduser()
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UsageError(f"cannot read {file}: {error.strerror}") from None
        column = None if kind == "text" else column or "text"
        sha256 = hashlib.sha256(content).hexdigest()
        return Text(f"{kind}:{file.name}", None, None, column, sha256, document_mode, str(file))
    if dataset == DEFAULT_DATASET:
        sha256 = hashlib.sha256("".join(_CANTERBURY.values()).encode()).hexdigest()
        return Text(dataset, sha256=sha256, document_mode=document_mode)
    known = HUB.get(dataset, HubDataset(dataset, None, None, "text", None))
    folder = Path(dataset).expanduser()
    local = dataset not in HUB and folder.is_dir()
    return Text(
        folder.name if local else dataset,
        known.revision,
        known.split,
        column or known.column,
        sha256=_folder_sha256(folder) if local else None,
        document_mode=document_mode,
        dataset_path=str(folder) if local else "",
    )


def has_rows(dataset: str) -> bool:
    """Whether ``dataset`` consists of rows, with a column of text, as all but plain text does."""
    return dataset != DEFAULT_DATASET and not dataset.startswith("text:")


def _folder_sha256(folder: Path) -> str:
    """Over names and contents of a folder's visible files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder)
        if not any(part.startswith(".") for part in name.parts):
            digest.update(f"{name.as_posix()} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


class Documents(NamedTuple):
    """A text as it was read."""

    texts: list[str]
    """None of them empty."""
    separator: str
    """What joins them in document mode ``concatenate``."""
    skipped_rows: int = 0
    """Rows of a dataset that were null, or held white space alone."""


def load_text(dataset: str) -> str:
    """The whole text that ``--dataset`` names, its documents joined.

    Raises:
        UsageError: the text cannot be had; the message says why.

    """
    documents = load_documents(describe(dataset, None, "concatenate"))
    return documents.separator.join(documents.texts)


def load_documents(text: Text) -> Documents:
    """The documents of a text.

    - ``canterbury``: the two English prose texts of the Canterbury corpus, paragraphs unwrapped:
      ``lcet10`` (proceedings of a Library of Congress workshop, 1992; public domain, and far
      less quoted than any novel) and ``alice29`` (Carroll). 121,000 SmolLM2 tokens. They come
      with the source distribution of ``Brotli``, which carries them as test data under fixed
      hashes, so every machine that reaches a package registry gets the same bytes.
    - ``text:FILE``: a local UTF-8 file, as it is, one document.
    - ``jsonl:FILE``, ``parquet:FILE``: a row is a document.
    - ``wikitext``, ``pg19``, ``arxiv``, or any name or folder ``datasets`` can load; a document
      of WikiText is an article, of others a row.

    Rows that hold no text (null, or white space alone) are no documents: they are left out and
    counted. A row of another type is refused: it says that the column is another one.

    Raises:
        UsageError: the text cannot be had, or holds nothing but white space; the message says
            why.

    """
    documents = _read(text)
    if not any(document.strip() for document in documents.texts):
        rows = f" in its {documents.skipped_rows} rows" if documents.skipped_rows else ""
        raise UsageError(f"{text.dataset} holds no text but white space{rows}; give another text")
    return documents


def skipped_note(text: Text, skipped_rows: int) -> str:
    """What a user is told where rows were left out."""
    return f"{text.dataset}: {skipped_rows} row(s) without text in {text.column!r} are left out"


def _read(text: Text) -> Documents:
    kind = text.dataset.partition(":")[0]
    if text.dataset == DEFAULT_DATASET:
        files = [_unwrap(_canterbury(name, _CANTERBURY[name])) for name in _CANTERBURY]
        return Documents(files, "\n\n")
    if kind == "text" and text.dataset_path:
        path = Path(text.dataset_path)
        try:
            return Documents([path.read_text(encoding="utf-8")], "")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read {path} as UTF-8 text: {error}") from None
    known = None if text.dataset_path else HUB.get(text.dataset)  # a folder may bear the name
    rows = read_rows(text, known, others=(DEFAULT_DATASET, *HUB))
    if known is not None and not known.separator:
        # Rows are lines here, and an empty line is a part of the text.
        articles = _ARTICLE.split("".join(row or "" for row in rows))
        return Documents([article for article in articles if article.strip()], "")
    filled = [row for row in rows if row is not None and row.strip()]
    return Documents(filled, "\n\n", len(rows) - len(filled))


def resolved_revision(text: Text) -> str | None:
    """The hub commit that was read: the pinned one, or what the newest was at loading time.
    None for a text that is not from the hub, and without a network."""
    if text.revision or text.dataset_path or text.sha256:
        return text.revision
    known = HUB.get(text.dataset)
    try:
        from huggingface_hub import HfApi

        return HfApi().dataset_info(known.path if known else text.dataset).sha
    except Exception:  # offline with a filled cache: what was read cannot be told
        return None


def resolved_split(text: Text) -> str | None:
    """The split that is read; None for texts that have none, and without a network."""
    if text.split or text.dataset == DEFAULT_DATASET or text.dataset.partition(":")[0] in _FILES:
        return text.split
    try:
        return split_of(text.dataset_path or text.dataset)
    except Exception:  # offline with a filled cache: what was read cannot be told
        return None


def _canterbury(name: str, sha256: str) -> str:
    path = fetch_member(
        _PACKAGE, f"/testdata/{name}", sha256, cache_folder() / "texts" / name, source=True
    )
    return path.read_text(encoding="latin-1")


def _unwrap(text: str) -> str:
    """Hard-wrapped lines joined to paragraphs: line breaks are not prose."""
    paragraphs = re.split(r"\n\s*\n", text.replace("\r\n", "\n"))
    return "\n\n".join(filter(None, (" ".join(paragraph.split()) for paragraph in paragraphs)))
