"""A study, run: one engine per engine configuration, a record per run, resumable at any point."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_plugins.config import EvictionConfigError

from .engine import Engine, UnfaithfulRun
from .errors import UsageError
from .launch import device_type, preflight, running
from .measure import measure_perplexity, measure_throughput, warm_up
from .plan import Comparison, comparisons
from .records import (
    EXPERIMENT,
    FAILED,
    SCHEMA_VERSION,
    provenance,
    read_json,
    timestamp,
    write_json,
)
from .resume import missing
from .specification import PERPLEXITY, EngineSpecification, RunSpecification
from .study import Study
from .texts import Texts

Progress = Callable[[str, int], None]
Job = tuple[Path, RunSpecification]


@dataclass
class Session:
    """Where the time of one invocation goes, seconds."""

    started: str = field(default_factory=timestamp)
    clock: float = field(default_factory=time.perf_counter)
    parts: dict[str, float] = field(default_factory=dict)
    engine_starts: int = 0
    runs_done: int = 0
    runs_skipped: int = 0
    runs_failed: int = 0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the block's time under ``name``, also where it fails."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.parts[name] = self.parts.get(name, 0.0) + time.perf_counter() - started

    def to_dict(self) -> dict[str, Any]:
        wall = time.perf_counter() - self.clock
        starts = self.parts.get("engine", 0.0) + self.parts.get("warm_up", 0.0)
        measuring = self.parts.get("measuring", 0.0)
        return {
            "started": self.started,
            "wall_seconds": round(wall, 3),
            "engine_starts": self.engine_starts,
            "engine_start_seconds": round(starts, 3),
            "measuring_seconds": round(measuring, 3),
            "harness_seconds": round(wall - starts - measuring, 3),
            "overhead_share": round(1 - measuring / wall, 4),
            "seconds_by_part": {name: round(value, 3) for name, value in self.parts.items()},
            "runs_done": self.runs_done,
            "runs_skipped": self.runs_skipped,
            "runs_failed": self.runs_failed,
        }


class Sweep:
    """One invocation of a study.

    Args:
        study: its settings.
        folder: of the experiment.
        redo: measure again what other code or another specification measured.

    Raises:
        UsageError: settings, model, text or folder are wrong; nothing was started.

    """

    def __init__(self, study: Study, folder: Path, redo: bool = False) -> None:
        self.folder = folder
        self.study = study
        self.session = Session()
        with self.session.part("import"):
            device = device_type()
            self.source = provenance(device)
        with self.session.part("plan"):
            self.comparisons: list[Comparison] = comparisons(study, folder, device)
            self.jobs = missing(self.comparisons, self.source, redo)
        self.failures: list[tuple[str, str]] = []
        total = sum(len(point.runs) for point in self.comparisons)
        self.session.runs_skipped = total - len(self.jobs)
        try:
            with self.session.part("read"):
                self.texts = Texts([run for _, run in self.jobs])
        except UsageError:
            # A model that cannot be used at all is the better reason to give.
            self._preflight()
            raise
        with self.session.part("preflight"):
            self._preflight()
        with self.session.part("tokenize"):
            self.texts.check()

    @property
    def total_windows(self) -> int:
        """Windows and requests that are still to be run: the unit of progress."""
        return sum(_size(run) for _, run in self.jobs)

    def run(self, progress: Progress = lambda label, finished: None) -> None:
        """Measure what is missing; every record is written as soon as it is there.

        A run that fails is recorded under ``failed/`` and the sweep goes on.

        Raises:
            UsageError: the folder cannot be written.

        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write_experiment(append=True)
        except OSError as error:
            raise UsageError(f"cannot write to {self.folder}: {error.strerror}") from None
        try:
            for specification in self._engines():
                jobs = [job for job in self.jobs if job[1].engine == specification]
                self._run_engine(specification, jobs, progress)
        finally:
            self._write_experiment()

    def _preflight(self) -> None:
        for specification in self._engines():
            preflight(specification)

    def _engines(self) -> list[EngineSpecification]:
        engines: list[EngineSpecification] = []
        for _, run in self.jobs:
            if run.engine not in engines:
                engines.append(run.engine)
        return engines

    def _run_engine(
        self, specification: EngineSpecification, jobs: Sequence[Job], progress: Progress
    ) -> None:
        """All jobs of one engine; it is started anew only where a failure may have broken it."""
        remaining = list(jobs)
        while remaining:
            with ExitStack() as stack:
                progress("engine starts", 0)
                self.session.engine_starts += 1
                try:
                    with self.session.part("engine"):
                        engine = stack.enter_context(running(specification))
                    with self.session.part("warm_up"):
                        warm_up(engine, self.texts.any_window(remaining[0][1]))
                except Exception as error:
                    for job in remaining:
                        self._fail(job, error)
                        progress(job[1].key, _size(job[1]))
                    return
                progress("engine is up", 0)
                healthy = True
                while remaining and healthy:
                    healthy = self._run_job(engine, remaining.pop(0), progress)
                with self.session.part("shutdown"):
                    stack.close()

    def _run_job(self, engine: Engine, job: Job, progress: Progress) -> bool:
        """Measure and record; False: the engine may be broken."""
        folder, run = job
        finished = 0

        def advance(count: int) -> None:
            nonlocal finished
            finished += count
            progress(run.key, count)

        try:
            with self.session.part("measuring"):
                record = self._measure(engine, run, advance)
        except Exception as error:
            self._fail(job, error)
            progress(run.key, _size(run) - finished)
            return isinstance(error, UnfaithfulRun)
        write_json(folder / run.file_name, {**record, **self.texts.source(run), **self.source})
        (folder / FAILED / run.file_name).unlink(missing_ok=True)
        self.session.runs_done += 1
        self._write_experiment()
        return True

    def _measure(
        self, engine: Engine, run: RunSpecification, progress: Callable[[int], None]
    ) -> dict[str, Any]:
        if run.measure == PERPLEXITY:
            windows = self.texts.windows(run)
            sizes = self.texts.sizes(run, windows)
            return measure_perplexity(run, engine, windows, sizes, progress)
        return measure_throughput(run, engine, self.texts.prompts(run), progress)

    def _fail(self, job: Job, error: Exception) -> None:
        folder, run = job
        expected = isinstance(error, (UnfaithfulRun, UsageError, EvictionConfigError))
        reason = str(error) if expected else f"{type(error).__name__}: {error}"
        self.failures.append((run.file_name, reason))
        self.session.runs_failed += 1
        write_json(
            folder / FAILED / run.file_name,
            {
                "schema_version": SCHEMA_VERSION,
                "timestamp": timestamp(),
                "status": "failed",
                "reason": reason,
                "key": run.key,
                "seed": run.seed,
                "specification_hash": run.hash,
                "specification": run.to_dict(),
                **self.source,
            },
        )
        self._write_experiment()

    def _write_experiment(self, append: bool = False) -> None:
        path = self.folder / EXPERIMENT
        sessions = read_json(path)["sessions"] if path.exists() else []
        sessions = sessions if append or not sessions else sessions[:-1]
        write_json(
            path,
            {
                "schema_version": SCHEMA_VERSION,
                "study": self.study.to_dict(),
                "comparisons": [
                    {"varied": point.varied, "folder": str(point.folder.relative_to(self.folder))}
                    for point in self.comparisons
                ],
                "sessions": [*sessions, self.session.to_dict()],
            },
        )


def _size(run: RunSpecification) -> int:
    return run.num_samples if run.load is None else 2 * run.load.num_requests
