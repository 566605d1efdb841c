"""Bench studies: loads on engines in processes of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar

from ..measure.batch import PolicyFailed, measure_batch, warm_up
from ..records.batch import BATCH_RECORDS, read_batch_record, study_load
from ..records.provenance import SCHEMA_VERSION, provenance
from ..records.specifications import VARIED
from ..resources.batch_engine import BatchEngine, BatchEngineError, batch_engine
from ..resources.launch import check_batch_engine, device_type
from ..resources.processes import new_log
from ..study.bench_load import BenchRun
from ..study.bench_study import BenchStudy
from .job import Job
from .loop import Sweep
from .resume import Records, changes

LOGS = "logs"
MEASURING = ("harness.measure.batch", "harness.resources.batch_worker")
"""What a record depends on, beside the plugin."""


class _Stored(Records):
    patterns = (BATCH_RECORDS,)

    def read(self, path: Path) -> dict[str, Any]:
        return read_batch_record(path)

    def specification(self, record: dict[str, Any]) -> dict[str, Any]:
        return record["specification"]

    def stray(self, record: dict[str, Any], runs: Sequence[BenchRun]) -> str | None:
        ours, there = _shared(runs[0].to_dict()), _shared(record["specification"])
        if there == ours:
            return None
        return f"belongs to another study ({changes(there, {'load': ours['load']})})"


def _shared(specification: dict[str, Any]) -> dict[str, Any]:
    """What all runs of a study agree in: methods differ in their engines, and may have a load of
    their own."""
    own = {*VARIED, "engine", "study_load"}
    shared = {name: value for name, value in specification.items() if name not in own}
    return {**shared, "load": study_load(specification)}


class BenchSweep(Sweep):
    """One invocation of a bench study.

    An engine that does not start fails all runs that need it. One that fails in a batch fails that
    run, and the next run gets a new one.

    Args:
        study: its settings.
        folder: of the experiment.
        redo: measure again what other code or another specification measured.

    Raises:
        UsageError: the folder holds runs of another study, or vLLM refuses model or settings.

    """

    records = _Stored()
    expected: ClassVar = (*Sweep.expected, BatchEngineError, PolicyFailed)

    def __init__(self, study: BenchStudy, folder: Path, redo: bool = False) -> None:
        super().__init__(folder, {"kind": "bench", **study.to_dict()})
        with self.session.part("import"):
            device = device_type()
            self.source = {"schema_version": SCHEMA_VERSION, **provenance(MEASURING, device)}
        with self.session.part("plan"):
            self.plan(study.points(folder), redo)
        with self.session.part("preflight"):
            for jobs in self.by_resource():
                longest = max(job.run.measurement.max_tokens for job in jobs)
                check_batch_engine(jobs[0].run.resource, longest)

    def resource_of(self, run: BenchRun) -> Any:
        return run.resource, run.seed if run.resource.rounds else None

    @contextmanager
    def started(self, job: Job) -> Iterator[BatchEngine]:
        """An engine that has started."""
        log = new_log(job.folder / LOGS, job.run.key)
        with ExitStack() as stack:
            with self.session.part("engine"):
                engine = stack.enter_context(batch_engine(job.run.resource, log))
            yield engine

    def prepare(self, engine: BatchEngine, job: Job) -> None:
        warm_up(job.run, engine)

    def measure(
        self, engine: BatchEngine, job: Job, advance: Callable[[int], None]
    ) -> dict[str, Any]:
        record = measure_batch(job.run, engine)
        advance(self.size(job.run))
        return {**record, **self.source}

    def size(self, run: BenchRun) -> int:
        return run.measurement.size

    def healthy_after(self, error: Exception) -> bool:
        return isinstance(error, PolicyFailed)
