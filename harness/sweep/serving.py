"""Runs a serving study: servers come and go, every run leaves a record, a second call resumes."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

from ..client.load_plan import Plan, make_plan
from ..client.load_settings import LoadSpecification, QualitySpecification
from ..client.target import Target, Texts, find_target
from ..errors import UnreadableFile, UnwritableFile, UsageError
from ..inputs.models import resolve_model
from ..measure.load import run_load
from ..measure.load_record import SCHEMA_VERSION, load_provenance
from ..records.files import write_json
from ..records.output import RecordElsewhere, output_path, save_record
from ..records.provenance import identity
from ..records.serving import STUDY, read_serving_record
from ..resources.serve_flags import eviction_flags, serve_flags
from ..resources.server import Server, ServerError, free_port, serving, vllm_command
from ..study.serving_study import STOCK, ServingRun, ServingStudy

LOGS = "logs"


@dataclass
class SweepResult:
    """What a sweep did. ``failed``: run or server key, and why."""

    finished: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    interrupted: bool = False


def run_sweep(study: ServingStudy, folder: Path, say: Callable[[str], None] = print) -> SweepResult:
    """Run what is not there yet.

    A server that does not start, or dies, fails its run and the sweep goes on with a new one; an
    interruption ends the sweep, and so does a record that cannot be written where it belongs.
    Every record is written as soon as its run ends. A record that cannot be read is measured again
    and replaced then.

    Raises:
        UsageError: the folder holds runs of another study, or the study cannot be run.

    """
    result = SweepResult()
    texts = Texts(study.model)
    pending = []
    for run in study.runs():
        if _is_done(run, folder, say):
            result.skipped.append(run.key)
        else:
            pending.append(run)
    if not pending:
        return result
    model = resolve_model(study.model)
    _check_plans(study, pending, texts)
    write_json(output_path(folder / STUDY), {"slo": study.slo, "runs": len(study.runs())})
    for server_key, runs in groupby(pending, key=lambda run: run.server_key):
        queue = list(runs)
        while queue and not result.interrupted:
            before = len(queue)
            try:
                _serve(study, model, server_key, queue, texts, folder, result, say)
            except ServerError as error:
                say(f"{server_key}: {error}")
                result.failed.append((server_key, str(error)))
                if len(queue) == before:  # not one run: starting it again would not help
                    break
            except (RecordElsewhere, UnwritableFile) as error:
                result.failed.append((server_key, str(error)))
                return result
        if result.interrupted:
            break
    return result


def server_command(study: ServingStudy, model: str, run: ServingRun) -> list[str]:
    """The command of a run's server, without host and port."""
    flags = serve_flags({"served_model_name": _served_name(study), **study.server})
    if run.method == STOCK:
        plain = {"block_size": study.block_size, "enable_prefix_caching": False}
        return vllm_command(model, [*serve_flags(plain), *flags])
    settings = study.settings(run.method, run.sparsity)
    return vllm_command(model, [*eviction_flags(study.block_size, settings), *flags])


def _serve(
    study: ServingStudy,
    model: str,
    key: str,
    queue: list[ServingRun],
    texts: Texts,
    folder: Path,
    result: SweepResult,
    say: Callable[[str], None],
) -> None:
    """One server, for as many runs of the queue as it lives through."""
    say(f"{key}: server starts")
    command = server_command(study, model, queue[0])
    log = _new_log(folder / LOGS, key)
    with serving(
        command,
        free_port(),
        log,
        startup_timeout_s=study.startup_timeout_s,
        environment={k: str(v) for k, v in study.environment.items()},
    ) as server:
        target = _target(server)
        result.interrupted = _warm_up(queue[0], texts, target, server)
        while queue and not result.interrupted:
            run = queue.pop(0)
            if not _one(run, texts, target, server, folder, result, say):
                return


def _target(server: Server) -> Target:
    try:
        return asyncio.run(find_target(server.base_url, None, _api_key()))
    except UsageError as error:
        raise ServerError(server.died() or str(error)) from None


def _one(
    run: ServingRun,
    texts: Texts,
    target: Target,
    server: Server,
    folder: Path,
    result: SweepResult,
    say: Callable[[str], None],
) -> bool:
    """One run; whether the server can take another."""
    say(f"{run.key}, seed {run.seed}")
    plan = _plan(run.study, run.load, texts, target.max_model_len)
    outcome = run_load(
        run.load, plan, target, server_pid=server.pid, watch=server.died, api_key=_api_key()
    )
    record = {**outcome.record, "kind": "serving", "run": run.describe()}
    record["target"].pop("base_url")  # a port chosen free says nothing
    if (reason := server.died()) and record["complete"]:
        record |= {"complete": False, "stop_reason": reason}
    save_record(folder / run.file_name, record)
    if record["complete"]:
        result.finished.append(run.key)
        return True
    result.failed.append((f"{run.key} seed {run.seed}", record["stop_reason"]))
    result.interrupted = outcome.interrupted
    say(f"{run.key}, seed {run.seed}: {record['stop_reason']}")
    return False


def _check_plans(study: ServingStudy, runs: Iterable[ServingRun], texts: Texts) -> None:
    """What is wrong with any load shows before a server starts."""
    length = study.server.get("max_model_len")
    loads = {json.dumps(run.load.to_dict(), sort_keys=True): run.load for run in runs}
    for load in loads.values():
        _plan(study, load, texts, length if type(length) is int else None)


def _plan(
    study: ServingStudy, load: LoadSpecification, texts: Texts, max_model_len: int | None
) -> Plan:
    size = study.vocabulary_size or texts.vocabulary_size
    return make_plan(load, size, texts.tokens_of, max_model_len)


def _warm_up(run: ServingRun, texts: Texts, target: Target, server: Server) -> bool:
    """Whether it was interrupted."""
    count = run.study.warm_up_requests
    if not count:
        return False
    load = replace(
        run.load,
        num_requests=count,
        arrivals="closed",
        max_concurrency=count,
        trace=None,
        prompts="random" if run.load.prompts == "trace" else run.load.prompts,
        quality=QualitySpecification(),
        warm_up_s=0.0,
        cool_down_s=0.0,
        seed=run.seed + 1_000_000,
    )
    plan = _plan(run.study, load, texts, target.max_model_len)
    outcome = run_load(load, plan, target, watch=server.died, progress=False, api_key=_api_key())
    return outcome.interrupted


def _api_key() -> str | None:
    """What vLLM takes as a server's key where no flag gives one; servers here inherit it."""
    return os.environ.get("VLLM_API_KEY")


def _is_done(run: ServingRun, folder: Path, say: Callable[[str], None]) -> bool:
    path = folder / run.file_name
    if not path.is_file():
        return False
    try:
        record = read_serving_record(path)
    except UnreadableFile:
        say(f"{path} cannot be read; its run is measured again")
        return False
    if record["run"]["hash"] != run.describe()["hash"]:
        raise UsageError(
            f"{path} is of another study; give another --output-dir, or remove it to run it again"
        )
    now = identity({"schema_version": SCHEMA_VERSION, **load_provenance()})
    if differing := [name for name, value in identity(record).items() if value != now[name]]:
        raise UsageError(
            f"{path} was measured with another {' and '.join(differing)}; give another "
            "--output-dir, or remove it to run it again"
        )
    return record["complete"]


def _new_log(folder: Path, key: str) -> Path:
    """A name of its own for each start: the log of a dead server is evidence."""
    return next(path for path in _log_names(folder, key) if not path.exists())


def _log_names(folder: Path, key: str) -> Iterator[Path]:
    yield folder / f"{key}.log"
    number = 2
    while True:
        yield folder / f"{key}.{number}.log"
        number += 1


def _served_name(study: ServingStudy) -> str:
    return Path(study.model).name
