"""Serving studies: loads over HTTP on servers that come and go."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Any, ClassVar

from ..client.load_plan import Plan, make_plan
from ..client.load_settings import LoadSpecification, QualitySpecification
from ..client.target import Target, Texts, find_target
from ..errors import UsageError
from ..inputs.models import resolve_model
from ..measure.load import run_load
from ..measure.load_record import SCHEMA_VERSION, load_provenance
from ..records.serving import SERVING_RECORDS, read_serving_record
from ..resources.serve_flags import eviction_flags, serve_flags
from ..resources.server import Server, ServerError, free_port, serving, vllm_command
from ..study.serving_study import STOCK, ServingRun, ServingStudy
from .loop import BrokenOff, Job, Sweep
from .resume import Records, missing

LOGS = "logs"


@dataclass(frozen=True)
class Serving:
    """A server that answers, and what it says about itself."""

    server: Server
    target: Target


class ServingSweep(Sweep):
    """One invocation of a serving study.

    A server that does not start fails all runs that need it; one that dies fails the run it died
    in, and the next run gets a new one.

    Args:
        study: its settings.
        folder: of the experiment.
        redo: measure again what other code or another specification measured.

    Raises:
        UsageError: the folder holds runs of another study, or the study cannot be run.

    """

    expected: ClassVar = (*Sweep.expected, ServerError)

    def __init__(self, study: ServingStudy, folder: Path, redo: bool = False) -> None:
        super().__init__(folder, {"kind": "serving", **study.to_dict()})
        self.source = {"schema_version": SCHEMA_VERSION, **load_provenance()}
        with self.session.part("plan"):
            self.points = study.points(folder)
            self.jobs, damaged = missing(
                self.points, _Stored(), SCHEMA_VERSION, self.source, redo, "--output-dir"
            )
            self.notes += damaged
        self.session.runs_skipped = sum(len(p.runs) for p in self.points) - len(self.jobs)
        self._texts: dict[str, Texts] = {}
        with self.session.part("read"):
            self._check_plans()

    def resource_of(self, run: ServingRun) -> Hashable:
        # Runs of one point share its study object; another point's server is another.
        return id(run.study), run.server_key

    @contextmanager
    def started(self, job: Job) -> Iterator[Serving]:
        """A server that has answered a few requests."""
        run, study = job.run, job.run.study
        with ExitStack() as stack:
            with self.session.part("engine"):
                server = stack.enter_context(
                    serving(
                        server_command(study, resolve_model(study.model), run),
                        free_port(),
                        _new_log(job.folder / LOGS, run.server_key),
                        startup_timeout_s=study.startup_timeout_s,
                        environment={k: str(v) for k, v in study.environment.items()},
                    )
                )
                target = _target(server)
            with self.session.part("warm_up"):
                self._warm_up(run, target, server)
            yield Serving(server, target)

    def measure(
        self, resource: Serving, job: Job, advance: Callable[[int], None]
    ) -> dict[str, Any]:
        run, server = job.run, resource.server
        plan = self._plan(run.study, run.load, resource.target.max_model_len)
        outcome = run_load(
            run.load,
            plan,
            resource.target,
            server_pid=server.pid,
            watch=server.died,
            api_key=_api_key(),
        )
        record = {
            **outcome.record,
            "kind": "serving",
            "key": run.key,
            "seed": run.seed,
            "specification_hash": run.hash,
            "run": run.described,
        }
        record["target"].pop("base_url")  # a port chosen free says nothing
        if (reason := server.died()) and record["complete"]:
            record |= {"complete": False, "stop_reason": reason}
        if not record["complete"]:
            raise BrokenOff(record["stop_reason"], record, outcome.interrupted)
        advance(self.size(run))
        return record

    def size(self, run: ServingRun) -> int:
        return run.load.num_requests

    def _check_plans(self) -> None:
        """What is wrong with any load shows before a server starts."""
        checked = set()
        for job in self.jobs:
            study, load = job.run.study, job.run.load
            key = id(study), json.dumps(load.to_dict(), sort_keys=True)
            if key not in checked:
                checked.add(key)
                length = study.server.get("max_model_len")
                self._plan(study, load, length if type(length) is int else None)

    def _plan(
        self, study: ServingStudy, load: LoadSpecification, max_model_len: int | None
    ) -> Plan:
        texts = self._texts.setdefault(study.model, Texts(study.model))
        size = study.vocabulary_size or texts.vocabulary_size
        return make_plan(load, size, texts.tokens_of, max_model_len)

    def _warm_up(self, run: ServingRun, target: Target, server: Server) -> None:
        num_requests = run.study.warm_up_requests
        if not num_requests:
            return
        load = replace(
            run.load,
            num_requests=num_requests,
            arrivals="closed",
            max_concurrency=num_requests,
            trace=None,
            prompts="random" if run.load.prompts == "trace" else run.load.prompts,
            quality=QualitySpecification(),
            warm_up_s=0.0,
            cool_down_s=0.0,
            seed=run.seed + 1_000_000,
        )
        plan = self._plan(run.study, load, target.max_model_len)
        outcome = run_load(
            load, plan, target, watch=server.died, progress=False, api_key=_api_key()
        )
        if outcome.interrupted:
            raise KeyboardInterrupt


class _Stored(Records):
    patterns = (SERVING_RECORDS,)

    def read(self, path: Path) -> dict[str, Any]:
        return read_serving_record(path)

    def specification(self, record: dict[str, Any]) -> dict[str, Any]:
        return {**record["run"], "load": record["specification"]}

    def stray(self, record: dict[str, Any], runs: Sequence[ServingRun]) -> str | None:
        return None  # other rates and methods may stand beside those of the study


def server_command(study: ServingStudy, model: str, run: ServingRun) -> list[str]:
    """The command of a run's server, without host and port."""
    flags = serve_flags({"served_model_name": Path(study.model).name, **study.server})
    if run.method.policy == STOCK:
        plain = {"block_size": study.block_size, "enable_prefix_caching": False}
        return vllm_command(model, [*serve_flags(plain), *flags])
    return vllm_command(model, [*eviction_flags(study.block_size, study.settings(run)), *flags])


def _target(server: Server) -> Target:
    try:
        return asyncio.run(find_target(server.base_url, None, _api_key()))
    except UsageError as error:
        raise ServerError(server.died() or str(error)) from None


def _api_key() -> str | None:
    """What vLLM takes as a server's key where no flag gives one; servers here inherit it."""
    return os.environ.get("VLLM_API_KEY")


def _new_log(folder: Path, key: str) -> Path:
    """A name of its own for each start: the log of a dead server is evidence."""
    names = chain([f"{key}.log"], (f"{key}.{number}.log" for number in count(2)))
    return next(path for name in names if not (path := folder / name).exists())
