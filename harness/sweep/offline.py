"""Offline studies: perplexity, tasks and throughput on engines in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar

from ..errors import UsageError
from ..measure.offline import measure_perplexity, measure_throughput, warm_up
from ..measure.tasks import measure_task
from ..records.provenance import SCHEMA_VERSION, provenance
from ..records.specifications import PERPLEXITY, TASK, VARIED, comparison
from ..records.stored import LOAD_RECORDS, PERPLEXITY_RECORDS, TASK_RECORDS, read_record
from ..resources.engine import Engine
from ..resources.launch import device_type, preflight, running
from ..resources.scored import NotFinite, UnfaithfulRun
from ..study.plan import comparisons
from ..study.settings import Study
from ..study.specification import Answers, OfflineRun, Perplexity
from .job import Job
from .loop import Sweep as Loop
from .resume import Records, changes
from .texts import Texts

MEASURING = (
    "harness.measure.offline",
    "harness.measure.tasks",
    "harness.resources.launch",
    "harness.sweep.texts",
)
"""What a record depends on, beside the plugin."""


class _Stored(Records):
    patterns = (PERPLEXITY_RECORDS, LOAD_RECORDS, TASK_RECORDS)

    def read(self, path: Path) -> dict[str, Any]:
        return read_record(path)

    def specification(self, record: dict[str, Any]) -> dict[str, Any]:
        return record["specification"]

    def stray(self, record: dict[str, Any], runs: Sequence[OfflineRun]) -> str | None:
        there = _shared(record["specification"])
        mates = [run for run in runs if run.kind == record["kind"]]
        if not mates or comparison(there) == mates[0].comparison:
            return None
        ours = _shared(mates[0].to_dict())
        return f"belongs to another comparison ({changes(there, ours)})"


def _shared(specification: dict[str, Any]) -> dict[str, Any]:
    """What all runs of a comparison agree in."""
    return {k: v for k, v in specification.items() if k not in VARIED}


class Sweep(Loop):
    """One invocation of an offline study.

    Args:
        study: its settings.
        folder: of the experiment.
        redo: measure again what other code or another specification measured.

    Raises:
        UsageError: settings, model, text or folder are wrong; nothing was started.

    """

    records = _Stored()
    elsewhere = "--experiment-name"
    expected: ClassVar = (*Loop.expected, UnfaithfulRun, NotFinite)

    def __init__(self, study: Study, folder: Path, redo: bool = False) -> None:
        super().__init__(folder, study.to_dict())
        self.notes += study.without_effect()
        with self.session.part("import"):
            device = device_type()
            self.source = {
                "schema_version": SCHEMA_VERSION,
                **provenance(MEASURING, device),
            }
        with self.session.part("plan"):
            self.plan(comparisons(study, folder, device), redo)
        try:
            with self.session.part("read"):
                self.texts = Texts([job.run for job in self.jobs])
        except UsageError:
            # A model that cannot be used at all is the better reason to give.
            self._preflight()
            raise
        with self.session.part("preflight"):
            self._preflight()
        with self.session.part("tokenize"):
            self.texts.check()
        self.notes += self.texts.notes

    @contextmanager
    def started(self, job: Job) -> Iterator[Engine]:
        """A running engine that has taken its first steps."""
        with ExitStack() as stack:
            with self.session.part("engine"):
                engine = stack.enter_context(running(job.run.resource))
            with self.session.part("warm_up"):
                warm_up(engine, self.texts.any_window(job.run))
            yield engine

    def measure(self, engine: Engine, job: Job, advance: Callable[[int], None]) -> dict[str, Any]:
        run = job.run
        if run.kind == PERPLEXITY:
            windows = self.texts.windows(run)
            sizes = self.texts.sizes(run, windows)
            record = measure_perplexity(run, engine, windows, sizes, advance)
        elif run.kind == TASK:
            record = measure_task(run, engine, self.texts.samples(run), advance)
        else:
            record = measure_throughput(run, engine, self.texts.prompts(run), advance)
        return {**record, **self.texts.source(run), **self.source}

    def size(self, run: OfflineRun) -> int:
        measurement = run.measurement
        if isinstance(measurement, Perplexity):
            return len(self.texts.windows(run))
        if isinstance(measurement, Answers):
            return len(self.texts.samples(run))
        return 2 * measurement.load.num_requests

    def healthy_after(self, error: Exception) -> bool:
        return isinstance(error, UnfaithfulRun)

    def _preflight(self) -> None:
        for jobs in self.by_resource():
            preflight(jobs[0].run.resource)
