"""Which text windows come from."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Text:
    """Which text the windows come from. Local files are told apart by their hash."""

    dataset: str
    """``wikitext``, a hub name, ``text:NAME`` without the folder."""
    revision: str | None = None
    split: str | None = None
    column: str | None = None
    sha256: str | None = None
    document_mode: str = "concatenate"
    dataset_path: str = field(default="", compare=False)
    """Where a local file lies on this machine: no part of records and hashes."""
