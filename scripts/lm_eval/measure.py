"""EleutherAI's lm-eval through servers of ``kv-eviction``: ``scripts/lm_eval/study``.

For each run one record: lm-eval's own result, and what the server's counters say it evicted in the
meantime. A run whose record is there is left out, so the same command goes on after an end.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import evictions
import lm_eval_cli
from local_tasks import write_tasks
from planned import TASKS, Run, by_server, planned, serve_flags

from harness.commands.interrupts import polite_ends
from harness.errors import UnreadableFile, UsageError
from harness.inputs.corpora import DEFAULT_DATASET, describe
from harness.inputs.models import DEFAULT_MODEL, fingerprint, recorded_name, resolve_model
from harness.inputs.text import Text
from harness.inputs.tokens import load_tokenizer, tokenize
from harness.records.files import read_json, write_json
from harness.records.provenance import provenance, timestamp
from harness.resources.processes import new_log
from harness.resources.server import ServerError, free_port, serving

SCHEMA_VERSION = 1
BLOCK_SIZE = 32
"""Of ``kv-eviction serve``, unless told otherwise."""
_MEASURING = ("harness.commands.serve", "harness.inputs.tasks.registry", "harness.client.scrape")
_SAME = (
    "schema_version",
    "settings",
    "data_sha256",
    "study_code",
    "code",
    "versions",
    "hardware",
    "lm_eval_versions",
)
"""What a record must agree in to be left as it is."""


def measure(arguments: argparse.Namespace) -> list[Path]:
    """Measure what is missing; the records of all runs.

    Raises:
        UsageError: something that was given is wrong, or lm-eval has no environment.
        ServerError, lm_eval_cli.Failed, evictions.NothingSeen: a run failed.

    """
    runs = planned(arguments.tasks, arguments.methods, arguments.sparsity)
    output: Path = arguments.output
    scratch = output / "scratch"
    lm_eval_versions = lm_eval_cli.versions()
    model = resolve_model(arguments.model)
    text = describe(arguments.dataset, None, "concatenate")
    data = _write_tasks(scratch, model, text, arguments)
    head = {
        "schema_version": SCHEMA_VERSION,
        "kind": "lm-eval",
        "data_sha256": data,
        "study_code": _own_code(),
        "lm_eval_versions": lm_eval_versions,
        **provenance(_MEASURING),
    }

    def record_of(run: Run) -> dict[str, Any]:
        settings = _settings(run, arguments, model, text)
        return {**head, "data_sha256": data[run.task], "settings": settings}

    paths = {run: output / f"{run.name}.json" for run in runs}
    missing = [run for run in runs if not _there(paths[run], record_of(run))]
    for server, of_server in by_server(missing):
        flags = serve_flags(
            server,
            name=recorded_name(model),
            context_length=arguments.context_length,
            score_chunk=arguments.score_chunk,
        )
        command = [sys.executable, "-m", "harness", "serve", model, *flags]
        log = new_log(output / "logs", f"serve_{server[0]}_s{server[1]:g}")
        with serving(command, free_port(), log) as running:
            for run in of_server:
                started = time.monotonic()
                made = _one(run, running.base_url, record_of(run), scratch, output / "logs")
                write_json(paths[run], {**made, "seconds": round(time.monotonic() - started, 1)})
                print(_told(made), flush=True)
    return list(paths.values())


def _one(
    run: Run, base_url: str, head: dict[str, Any], scratch: Path, logs: Path
) -> dict[str, Any]:
    flags = lm_eval_cli.arguments(
        run.task,
        name=head["settings"]["model"],
        base_url=base_url,
        length=head["settings"]["context_length"],
        settings=run.request_settings,
        output=f"results/{run.name}",
    )
    before = evictions.counters(base_url)
    lm_eval_cli.run(flags, scratch, f"results/{run.name}", new_log(logs, run.name))
    after = evictions.counters(base_url)
    result, samples = lm_eval_cli.read(scratch / "results" / run.name, run.task)
    seen = evictions.between(before, after, BLOCK_SIZE)
    evictions.check(seen, run.method, len(samples))
    return {
        **head,
        "timestamp": timestamp(),
        "scores": result["results"][run.task],
        "evicted": seen,
        "counters": {"before": before, "after": after},
        "samples": samples,
        "lm_eval": result,
    }


def _settings(run: Run, arguments: argparse.Namespace, model: str, text: Text) -> dict[str, Any]:
    """Everything that was asked for."""
    policy, sparsity = run.server
    return {
        "task": run.task,
        "method": run.method,
        "sparsity": run.sparsity,
        "server": {"policy": policy, "sparsity": sparsity},
        "request": run.request_settings,
        "model": recorded_name(model),
        "model_fingerprint": fingerprint(model),
        "text": {k: v for k, v in asdict(text).items() if k != "dataset_path"},
        "context_length": arguments.context_length,
        "num_samples": arguments.num_samples,
        "seed": arguments.seed,
        "score_chunk": arguments.score_chunk,
        "block_size": BLOCK_SIZE,
    }


def _write_tasks(
    scratch: Path, model: str, text: Text, arguments: argparse.Namespace
) -> dict[str, str]:
    tokenizer = load_tokenizer(model)
    made = write_tasks(
        scratch,
        tokenizer,
        tokenize(tokenizer, text),
        arguments.num_samples,
        arguments.context_length,
        arguments.seed,
    )
    # lm-eval's result names the tokenizer: not by a folder of this machine.
    link = scratch / "model"
    link.unlink(missing_ok=True)
    link.symlink_to(Path(model).resolve())
    return made


def _there(path: Path, wanted: dict[str, Any]) -> bool:
    try:
        record = read_json(path) if path.is_file() else {}
    except UnreadableFile:  # measured again
        return False
    return all(record.get(name) == wanted[name] for name in _SAME)


def _own_code() -> str:
    folder = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.py"), *folder.glob("tasks/*.yaml")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _told(record: dict[str, Any]) -> str:
    settings, seen = record["settings"], record["evicted"]
    scores = ", ".join(
        f"{name.partition(',')[0]} {value:.4g}"
        for name, value in record["scores"].items()
        if isinstance(value, float) and "stderr" not in name
    )
    return (
        f"{settings['task']} {settings['method']} {settings['sparsity']:g}: {scores}; "
        f"{seen['blocks_evicted']} blocks evicted"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a folder, or [%(default)s]")
    parser.add_argument("--dataset", default=DEFAULT_DATASET, help="the text [%(default)s]")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=["dense", "streaming", "h2o", "cab"])
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5, 0.9])
    parser.add_argument("--num-samples", type=_positive, default=16, help="of each task [16]")
    parser.add_argument(
        "--context-length", type=_positive, default=1088, help="tokens of a request [1088]"
    )
    parser.add_argument("--score-chunk", type=_positive, default=64, help="tokens of a step [64]")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is no number of at least 1")
    return int(text)


def main(run: Callable[[argparse.Namespace], Sequence[Path]] = measure) -> int:
    """Measure what is missing; 1: a run failed, 2: something that was given is wrong."""
    arguments = _arguments()
    try:
        with polite_ends():
            paths = run(arguments)
    except UsageError as error:
        print(f"lm-eval study: {error}", file=sys.stderr)
        return 2
    except (ServerError, lm_eval_cli.Failed, evictions.NothingSeen) as error:
        print(f"lm-eval study: {error}; run it again to go on", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lm-eval study: interrupted; run it again to go on", file=sys.stderr)
        return 130
    print(f"{len(paths)} records in {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
