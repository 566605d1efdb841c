"""The one loop of every study: runs grouped by what they need started, measured and recorded.

A kind of study (``offline.py``, ``serving.py``) says what a resource is, how it starts and how a
run is measured on it. All else is here. What is recorded is skipped. Each resource starts once, and
again only where a failure may have broken it. What fails is recorded under ``failed/``. Where the
time went stands in ``experiment.json``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Any, ClassVar

from vllm_plugins.parsing import EvictionConfigError

from ..errors import UnwritableFile, UsageError
from ..records.files import write_json
from ..records.head import record_head
from ..records.output import RecordElsewhere, save_record
from ..study.points import Comparison
from .experiment import Experiment
from .job import Job
from .resume import Records, missing
from .session import Session

Progress = Callable[[str, int], None]
"""Hears what goes on, and how many units of work it was (0: it begins)."""


class BrokenOff(Exception):
    """A run ended early. ``record``: what there is of it; ``interrupted``: by the user."""

    def __init__(self, reason: str, record: dict[str, Any], interrupted: bool = False) -> None:
        super().__init__(reason)
        self.record, self.interrupted = record, interrupted


class Sweep(ABC):
    """One invocation of a study.

    Subclasses set ``source``, and call ``plan``, before ``run`` is called.

    Args:
        folder: of the experiment.
        study: its settings, for ``experiment.json``.

    """

    records: ClassVar[Records]
    """How this kind of study stores its runs."""
    elsewhere: ClassVar[str] = "--output-dir"
    """The flag that names another folder."""

    expected: ClassVar[tuple[type[Exception], ...]] = (UsageError, EvictionConfigError, BrokenOff)
    """Errors whose message alone is the reason a reader needs."""

    def __init__(self, folder: Path, study: dict[str, Any]) -> None:
        self.folder = folder
        self.session = Session()
        self.experiment = Experiment(folder, study)
        self.notes: list[str] = list(self.experiment.notes)
        """What the user should know of before anything runs, a sentence each."""
        self.failures: list[tuple[str, str]] = []
        self.points: Sequence[Comparison] = ()
        self.jobs: Sequence[Job] = ()
        self.source: dict[str, Any] = {}
        """Schema version, versions, hardware and code of this process."""

    def plan(self, points: Sequence[Comparison], redo: bool) -> None:
        """Find out which runs of ``points`` have no record yet.

        Args:
            points: of the study.
            redo: measure again what other code or another specification measured.

        Raises:
            UsageError: a record in the folder does not belong to this study.

        """
        self.points = points
        self.jobs, damaged = missing(points, self.records, self.source, redo, self.elsewhere)
        self.notes += damaged
        self.session.runs_skipped = sum(len(p.runs) for p in points) - len(self.jobs)

    def resource_of(self, run: Any) -> Any:
        """Runs with equal resources share a start."""
        return run.resource

    @abstractmethod
    def started(self, job: Job) -> AbstractContextManager[Any]:
        """What runs are measured on, started and warmed up for the duration of the block."""

    def prepare(self, resource: Any, job: Job) -> None:  # noqa: B027  nothing, for most kinds
        """What a run needs on a resource before it is measured; counts as warm-up."""

    @abstractmethod
    def measure(self, resource: Any, job: Job, advance: Callable[[int], None]) -> dict[str, Any]:
        """The record of a run; ``advance`` hears of each unit of work that is done.

        Raises:
            BrokenOff: the run ended early.

        """

    @abstractmethod
    def size(self, run: Any) -> int:
        """Units of work of a run: windows, requests."""

    def healthy_after(self, error: Exception) -> bool:
        """Whether a resource can take another run after one failed so."""
        return False

    @property
    def total_size(self) -> int:
        """Units of work that are still to be done."""
        return sum(self.size(job.run) for job in self.jobs)

    def run(self, progress: Progress = lambda label, finished: None) -> None:
        """Measure what is missing; every record is written as soon as it is there.

        A run that fails is recorded under ``failed/`` and the sweep goes on.

        Raises:
            UsageError: the folder cannot be written; nothing was started.
            UnwritableFile, RecordElsewhere: a record cannot be written where it belongs; what is
                finished is kept.

        """
        try:
            for folder in {self.folder, *(point.folder for point in self.points)}:
                folder.mkdir(parents=True, exist_ok=True)
            self._save_session()
        except (OSError, UnwritableFile) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"cannot write to {self.folder}: {reason}") from None
        try:
            for jobs in self.by_resource():
                self._run_on_one(jobs, progress)
        finally:
            with suppress(UnwritableFile):
                self._save_session()

    def by_resource(self) -> list[list[Job]]:
        """The jobs of each resource, in the order of the first. Resources have no hash."""
        groups: list[tuple[Any, list[Job]]] = []
        for job in self.jobs:
            resource = self.resource_of(job.run)
            there = next((jobs for other, jobs in groups if other == resource), None)
            if there is None:
                groups.append((resource, [job]))
            else:
                there.append(job)
        return [jobs for _, jobs in groups]

    def _run_on_one(self, jobs: Sequence[Job], progress: Progress) -> None:
        """All jobs of one resource; it is started anew only where a failure may have broken it."""
        remaining = list(jobs)
        while remaining:
            with ExitStack() as stack:
                progress(f"{remaining[0].run.key}: start", 0)
                self.session.engine_starts += 1
                try:
                    resource = stack.enter_context(self.started(remaining[0]))
                except Exception as error:
                    for job in remaining:
                        self._fail(job, error)
                        progress(job.run.key, self.size(job.run))
                    return
                healthy = True
                while remaining and healthy:
                    healthy = self._run_job(resource, remaining.pop(0), progress)
                with self.session.part("shutdown"):
                    stack.close()

    def _run_job(self, resource: Any, job: Job, progress: Progress) -> bool:
        """Measure and record; False: the resource may be broken."""
        finished = 0

        def advance(count: int) -> None:
            nonlocal finished
            finished += count
            progress(job.run.key, count)

        progress(f"{job.run.key}, seed {job.run.seed}", 0)
        try:
            with self.session.part("warm_up"):
                self.prepare(resource, job)
            with self.session.part("measuring"):
                record = self.measure(resource, job, advance)
            save_record(job.path, record)
        except (UnwritableFile, RecordElsewhere):
            raise
        except Exception as error:
            self._fail(job, error)
            progress(job.run.key, self.size(job.run) - finished)
            if getattr(error, "interrupted", False):
                raise KeyboardInterrupt from None
            return self.healthy_after(error)
        job.failed_path.unlink(missing_ok=True)
        self.session.runs_done += 1
        self._save_session()
        return True

    def _fail(self, job: Job, error: Exception) -> None:
        reason = str(error)
        if not isinstance(error, self.expected):
            reason = f"{type(error).__name__}: {reason}"
        self.failures.append((job.run.file_name, reason))
        self.session.runs_failed += 1
        made = {
            **self.source,
            **getattr(error, "record", {}),
            **record_head(job.run, self.source["schema_version"]),
            "status": "failed",
            "reason": reason,
            "specification": job.run.to_dict(),
        }
        write_json(job.failed_path, made)
        self._save_session()

    def _save_session(self) -> None:
        self.experiment.save(self.session, self.points)
