"""A run that is to be measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..records.stored import FAILED
from ..study.run import Run


@dataclass(frozen=True)
class Job:
    """A run, and where its record goes."""

    folder: Path
    run: Run[Any, Any]

    @property
    def path(self) -> Path:
        return self.folder / self.run.file_name

    @property
    def failed_path(self) -> Path:
        return self.folder / FAILED / self.run.file_name
