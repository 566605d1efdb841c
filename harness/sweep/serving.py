"""Serving studies: loads over HTTP on servers that come and go."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from ..client.load_plan import Plan, make_plan
from ..client.load_settings import LoadSpecification, QualitySpecification
from ..client.target import Target, Texts, find_target
from ..errors import UsageError
from ..measure.load import run_load
from ..measure.load_record import SCHEMA_VERSION, load_provenance
from ..records.head import record_head
from ..records.serving import SERVING_RECORDS, read_serving_record
from ..records.specifications import STOCK
from ..resources.processes import new_log
from ..resources.serve_flags import eviction_flags, serve_flags
from ..resources.server import Server, ServerError, free_port, serving, vllm_command
from ..study.run import Budget, Method
from ..study.serving_specification import ServerSpecification, ServingRun, server_settings
from ..study.serving_study import ServingStudy
from .job import Job
from .loop import BrokenOff, Sweep
from .resume import Records

LOGS = "logs"


@dataclass(frozen=True)
class Serving:
    """A server that answers, and what it says about itself."""

    server: Server
    target: Target


class _Stored(Records):
    patterns = (SERVING_RECORDS,)

    def read(self, path: Path) -> dict[str, Any]:
        return read_serving_record(path)

    def specification(self, record: dict[str, Any]) -> dict[str, Any]:
        return {**record["run"], "load": record["specification"]}

    def stray(self, record: dict[str, Any], runs: Sequence[ServingRun]) -> str | None:
        return None  # other rates and methods may stand beside those of the study


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

    records = _Stored()
    expected: ClassVar = (*Sweep.expected, ServerError)

    def __init__(self, study: ServingStudy, folder: Path, redo: bool = False) -> None:
        super().__init__(folder, {"kind": "serving", **study.to_dict()})
        self.source = {"schema_version": SCHEMA_VERSION, **load_provenance()}
        with self.session.part("plan"):
            self.plan(study.points(folder), redo)
        self._texts: dict[str, Texts] = {}
        with self.session.part("read"):
            self._check_plans()

    def resource_of(self, run: ServingRun) -> tuple[ServerSpecification, Method, Budget]:
        return run.resource, run.method, run.budget

    @contextmanager
    def started(self, job: Job) -> Iterator[Serving]:
        """A server that has answered a few requests."""
        run: ServingRun = job.run
        specification = run.resource
        with ExitStack() as stack:
            with self.session.part("engine"):
                server = stack.enter_context(
                    serving(
                        server_command(run),
                        free_port(),
                        new_log(job.folder / LOGS, f"{run.method.name}_{run.level}"),
                        startup_timeout_s=specification.startup_timeout_s,
                        environment={k: str(v) for k, v in specification.environment.items()},
                    )
                )
                target = _target(server)
            with self.session.part("warm_up"):
                self._warm_up(run, target, server)
            yield Serving(server, target)

    def measure(
        self, resource: Serving, job: Job, advance: Callable[[int], None]
    ) -> dict[str, Any]:
        run: ServingRun = job.run
        server, load = resource.server, run.measurement.load
        outcome = run_load(
            load,
            self._plan(run, load, resource.target.max_model_len),
            resource.target,
            server_pid=server.pid,
            watch=server.died,
            api_key=_api_key(),
        )
        stored = run.to_dict()
        del stored["load"]  # the record's own specification
        record = {**outcome.record, **record_head(run, SCHEMA_VERSION), "run": stored}
        record["target"].pop("base_url")  # a port chosen free says nothing
        if (reason := server.died()) and record["complete"]:
            record |= {"complete": False, "stop_reason": reason}
        if not record["complete"]:
            raise BrokenOff(record["stop_reason"], record, outcome.interrupted)
        advance(self.size(run))
        return record

    def size(self, run: ServingRun) -> int:
        return run.measurement.load.num_requests

    def _check_plans(self) -> None:
        """What is wrong with any load shows before a server starts."""
        checked = set()
        for job in self.jobs:
            run: ServingRun = job.run
            server, load = run.resource, run.measurement.load
            length = server.server.get("max_model_len")
            key = server.model_name, length, json.dumps(load.to_dict(), sort_keys=True)
            if key not in checked:
                checked.add(key)
                self._plan(run, load, length if type(length) is int else None)

    def _plan(self, run: ServingRun, load: LoadSpecification, max_model_len: int | None) -> Plan:
        server = run.resource
        texts = self._texts.setdefault(server.model_name, Texts(server.model_name))
        size = server.vocabulary_size or texts.vocabulary_size
        return make_plan(load, size, texts.tokens_of, max_model_len)

    def _warm_up(self, run: ServingRun, target: Target, server: Server) -> None:
        num_requests = run.resource.warm_up_requests
        own = run.measurement.load
        if not num_requests:
            return
        load = replace(
            own,
            num_requests=num_requests,
            arrivals="closed",
            max_concurrency=num_requests,
            trace=None,
            prompts="random" if own.prompts == "trace" else own.prompts,
            quality=QualitySpecification(),
            warm_up_s=0.0,
            cool_down_s=0.0,
            seed=run.seed + 1_000_000,
        )
        plan = self._plan(run, load, target.max_model_len)
        outcome = run_load(
            load, plan, target, watch=server.died, progress=False, api_key=_api_key()
        )
        if outcome.interrupted:
            raise KeyboardInterrupt


def server_command(run: ServingRun) -> list[str]:
    """The command of a run's server, without host and port."""
    server = run.resource
    name = {"served_model_name": Path(server.model_name).name}
    flags = serve_flags({**name, **server.server})
    if run.method.policy == STOCK:
        plain = {"block_size": server.block_size, "enable_prefix_caching": False}
        return vllm_command(server.model_path, [*serve_flags(plain), *flags])
    # Random prompts share nothing; with stock's cache off, ours is too.
    options = {**server_settings(run), "prefix_caching": False}
    settings = eviction_flags(server.block_size, options)
    return vllm_command(server.model_path, [*settings, *flags])


def _target(server: Server) -> Target:
    try:
        return asyncio.run(find_target(server.base_url, None, _api_key()))
    except UsageError as error:
        raise ServerError(server.died() or str(error)) from None


def _api_key() -> str | None:
    """What vLLM takes as a server's key where no flag gives one; servers here inherit it."""
    return os.environ.get("VLLM_API_KEY")
