"""A study, run: one engine per engine configuration, a record per run, resumable at any point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from vllm_plugins.config import EvictionConfigError

from ..errors import UnreadableFile, UnwritableFile, UsageError
from ..measure.offline import measure_perplexity, measure_throughput, warm_up
from ..records.files import write_json
from ..records.provenance import SCHEMA_VERSION, provenance, timestamp
from ..records.stored import EXPERIMENT, FAILED, read_experiment
from ..resources.engine import Engine, NotFinite, UnfaithfulRun
from ..resources.launch import device_type, preflight, running
from ..study.plan import Comparison, comparisons
from ..study.settings import Study
from ..study.specification import PERPLEXITY, EngineSpecification, RunSpecification
from .resume import missing
from .session import Session
from .texts import Texts

Progress = Callable[[str, int], None]
Job = tuple[Path, RunSpecification]
MEASURING = ("harness.measure.offline", "harness.resources.launch", "harness.sweep.texts")
"""What a record depends on, beside the plugin."""
_EXPECTED = (UnfaithfulRun, NotFinite, UsageError, EvictionConfigError)
"""Errors whose message alone is the reason a reader needs."""


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
        self.notes = study.without_effect()
        """What the user should know of before anything runs, a sentence each."""
        self.sessions = self._earlier_sessions()
        with self.session.part("import"):
            device = device_type()
            self.source = provenance(MEASURING, device)
        with self.session.part("plan"):
            self.comparisons: list[Comparison] = comparisons(study, folder, device)
            self.jobs, damaged = missing(self.comparisons, self.source, redo)
            self.notes += damaged
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
        self.notes += self.texts.notes

    @property
    def total_windows(self) -> int:
        """Windows and requests that are still to be run: the unit of progress."""
        return sum(_size(run) for _, run in self.jobs)

    def run(self, progress: Progress = lambda label, finished: None) -> None:
        """Measure what is missing; every record is written as soon as it is there.

        A run that fails is recorded under ``failed/`` and the sweep goes on.

        Raises:
            UsageError: the folder cannot be written, or no longer; finished runs are kept.

        """
        try:
            for folder in {self.folder, *(point.folder for point in self.comparisons)}:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot write to {self.folder}: {error.strerror}") from None
        self._write_experiment()
        try:
            for specification in self._engines():
                jobs = [job for job in self.jobs if job[1].engine == specification]
                self._run_engine(specification, jobs, progress)
            self._write_experiment()
        except UnwritableFile as error:
            raise UsageError(
                f"{error}; finished runs are kept, --experiment-name {self.folder.name} goes on"
            ) from None
        except BaseException:
            with suppress(UnwritableFile):
                self._write_experiment()
            raise

    def _earlier_sessions(self) -> list[dict[str, Any]]:
        path = self.folder / EXPERIMENT
        if not path.exists():
            return []
        try:
            return read_experiment(path)["sessions"]
        except UnreadableFile:
            self.notes.append(f"{path} is damaged: times of earlier sessions are lost, no run is")
            return []

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
            write_json(folder / run.file_name, {**record, **self.texts.source(run), **self.source})
        except UnwritableFile:
            raise
        except Exception as error:
            self._fail(job, error)
            progress(run.key, _size(run) - finished)
            return isinstance(error, UnfaithfulRun)
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
        reason = str(error)
        if not isinstance(error, _EXPECTED):
            reason = f"{type(error).__name__}: {reason}"
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

    def _write_experiment(self) -> None:
        write_json(
            self.folder / EXPERIMENT,
            {
                "schema_version": SCHEMA_VERSION,
                "study": self.study.to_dict(),
                "comparisons": [
                    {"varied": point.varied, "folder": str(point.folder.relative_to(self.folder))}
                    for point in self.comparisons
                ],
                "sessions": [*self.sessions, self.session.to_dict()],
            },
        )


def _size(run: RunSpecification) -> int:
    return run.num_samples if run.load is None else 2 * run.load.num_requests
