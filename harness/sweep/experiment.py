"""``experiment.json``: a study, its points, and where the time of each session went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UnreadableFile
from ..records.files import write_json
from ..records.provenance import SCHEMA_VERSION
from ..records.stored import EXPERIMENT, read_experiment
from ..study.points import Comparison
from .session import Session


class Experiment:
    """The file of one folder.

    Args:
        folder: of the experiment.
        study: its settings, as plain JSON values.

    """

    def __init__(self, folder: Path, study: dict[str, Any]) -> None:
        self._folder, self._study = folder, study
        self.notes: list[str] = []
        """What the user should know, a sentence each."""
        self._sessions = self._earlier_sessions()

    def save(self, session: Session, points: Sequence[Comparison]) -> None:
        """Write what is known now; ``session`` is the last one.

        Raises:
            UnwritableFile: the folder takes no file.

        """
        write_json(
            self._folder / EXPERIMENT,
            {
                "schema_version": SCHEMA_VERSION,
                "study": self._study,
                "comparisons": [
                    {
                        "varied": p.varied,
                        "folder": str(p.folder.relative_to(self._folder)),
                        "keys": list(dict.fromkeys(run.key for run in p.runs)),
                    }
                    for p in points
                ],
                "sessions": [*self._sessions, session.to_dict()],
            },
        )

    def _earlier_sessions(self) -> list[dict[str, Any]]:
        path = self._folder / EXPERIMENT
        if not path.exists():
            return []
        try:
            return read_experiment(path)["sessions"]
        except UnreadableFile:
            self.notes.append(f"{path} is damaged: times of earlier sessions are lost, no run is")
            return []
