"""Texts: the embedded one, local files, and ``datasets`` by name, all as documents."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UsageError
from .packages import cache_folder, fetch_member
from .specification import Text

DEFAULT_DATASET = "canterbury"
DOCUMENT_MODES = ("concatenate", "whole")
MAX_CHARACTERS = 20_000_000
"""Enough for any context here; a hub corpus is read no further."""

_PACKAGE = "Brotli==1.1.0"
_CANTERBURY = {
    "lcet10.txt": "5314ba1dbb03f471df88bec6cd120a938ef60d0fd3511c5c1dce61bf7463245f",
    "alice29.txt": "7467306ee0feed4971260f3c87421154a05be571d944e9cb021a5713700c38f0",
}
_FILES = {"text": None, "jsonl": "json", "parquet": "parquet"}
"""Kinds of local files, and the loader of ``datasets`` for them."""


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


HUB = {
    # Rows of WikiText are lines that end with their own newline.
    "wikitext": HubDataset(
        "Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text",
        "b08601e04326c79dfdd32d625aee71d232d685c3", "",
    ),
    "pg19": HubDataset(
        "emozilla/pg19", None, "test", "text", "c021754c8e01c5b1cc83a1f549c1f97fbbb756b8"
    ),
    "arxiv": HubDataset(
        "ccdv/arxiv-summarization", "document", "test", "article",
        "240aaf1a969b3f8cd0ade6986bfad0cd730ee288",
    ),
}  # fmt: skip
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


def load_text(dataset: str) -> str:
    """The whole text that ``--dataset`` names, its documents joined.

    Raises:
        UsageError: the text cannot be had; the message says why.

    """
    documents, separator = load_documents(describe(dataset, None, "concatenate"))
    return separator.join(documents)


def load_documents(text: Text) -> tuple[list[str], str]:
    """The documents of a text, and what joins them in document mode ``concatenate``.

    - ``canterbury``: the two English prose texts of the Canterbury corpus, paragraphs unwrapped:
      ``lcet10`` (proceedings of a Library of Congress workshop, 1992; public domain, and far
      less quoted than any novel) and ``alice29`` (Carroll). 121,000 SmolLM2 tokens. They come
      with the source distribution of ``Brotli``, which carries them as test data under fixed
      hashes, so every machine that reaches a package registry gets the same bytes.
    - ``text:FILE``: a local UTF-8 file, as it is, one document.
    - ``jsonl:FILE``, ``parquet:FILE``: a row is a document.
    - ``wikitext``, ``pg19``, ``arxiv``, or any name or folder ``datasets`` can load; a document
      of WikiText is an article, of others a row.

    Raises:
        UsageError: the text cannot be had; the message says why.

    """
    kind = text.dataset.partition(":")[0]
    if text.dataset == DEFAULT_DATASET:
        return [_unwrap(_canterbury(name, _CANTERBURY[name])) for name in _CANTERBURY], "\n\n"
    if kind == "text" and text.dataset_path:
        path = Path(text.dataset_path)
        try:
            return [path.read_text(encoding="utf-8")], ""
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read {path} as UTF-8 text: {error}") from None
    known = None if text.dataset_path else HUB.get(text.dataset)  # a folder may bear the name
    documents = _from_datasets(text, known)
    if known is not None and not known.separator:
        return [article for article in _ARTICLE.split("".join(documents)) if article.strip()], ""
    return documents, "\n\n"


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
        import datasets

        return _split(datasets, text.dataset_path or text.dataset, None, None)
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


def _from_datasets(text: Text, known: HubDataset | None) -> list[str]:
    import datasets

    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    name = known.path if known else text.dataset_path or text.dataset
    try:
        rows = _load(datasets, text, known, name)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"datasets cannot load {name}: {reason}; give text:FILE, jsonl:FILE, parquet:FILE, "
            f"a dataset's name or folder, or one of: {', '.join((DEFAULT_DATASET, *HUB))}"
        ) from None
    if text.column not in rows.column_names:
        raise UsageError(
            f"{name} has no column {text.column!r}; "
            f"name one with --text-column: {', '.join(rows.column_names)}"
        )
    documents: list[str] = []
    size = 0
    for row in rows:
        documents.append(row[text.column])
        size += len(documents[-1])
        if size > MAX_CHARACTERS:
            break
    return documents


def _load(datasets: Any, text: Text, known: HubDataset | None, name: str) -> Any:
    kind = text.dataset.partition(":")[0]
    if _FILES.get(kind) and text.dataset_path:
        return datasets.load_dataset(_FILES[kind], data_files=text.dataset_path, split="train")
    config, revision = (known.name, text.revision) if known else (None, None)
    split = text.split or _split(datasets, name, config, revision)
    return datasets.load_dataset(name, config, split=split, revision=revision)


def _split(datasets: Any, name: str, config: str | None, revision: str | None) -> str:
    """Its test split, or the only one it has."""
    available = datasets.get_dataset_split_names(name, config, revision=revision)
    if "test" not in available and len(available) > 1:
        raise ValueError(f"it has no test split, but {', '.join(available)}")
    return "test" if "test" in available else available[0]
