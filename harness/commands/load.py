"""``kv-eviction load``: an asynchronous load on a running OpenAI server."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from pathlib import Path
from typing import Any

from ..client.arrivals import PROCESSES
from ..client.load_settings import PROMPTS, LoadSpecification, QualitySpecification
from ..errors import UnwritableFile, UsageError
from ..inputs.corpora import DEFAULT_DATASET

_D = LoadSpecification(num_requests=100)
_Q = QualitySpecification()


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "load",
        help="load a running server over HTTP: latency, throughput, memory and quality together",
        description="Sends a load to an OpenAI-compatible server and writes one JSON record. "
        "OPENAI_API_KEY is sent where it is set. Exit status 1: some requests did not succeed, the "
        "run ended early, or the record is in a temporary file because --output failed.",
    )
    add = parser.add_argument
    add("--base-url", default="http://localhost:8000", metavar="URL", help="[%(default)s]")
    add("--model", default=None, metavar="NAME", help="as the server calls it [its first]")
    add("--output", type=Path, required=True, metavar="FILE", help="the record")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--num-requests", type=int, metavar="N")
    size.add_argument(
        "--duration",
        dest="duration_s",
        type=float,
        metavar="S",
        help="as many requests as the rate makes in so many seconds (open loops)",
    )
    add("--seed", type=int, default=0, help="of times, prompts and lengths [%(default)s]")
    add(
        "--timeout",
        dest="timeout_s",
        type=float,
        default=_D.timeout_s,
        metavar="S",
        help="a request may take so many seconds [%(default)g]",
    )
    _add_times(parser.add_argument_group("when requests are sent"))
    _add_contents(parser.add_argument_group("what they ask for"))
    _add_measures(parser.add_argument_group("what is measured"))
    parser.set_defaults(run=run)


def _add_times(group: Any) -> None:
    add = group.add_argument
    add(
        "--arrivals",
        choices=PROCESSES,
        default=_D.arrivals,
        help="closed: --max-concurrency in flight; the others: open loops [poisson]",
    )
    add("--request-rate", default="inf", metavar="R", help="per second; inf: all at once [inf]")
    add(
        "--burstiness",
        type=float,
        default=_D.burstiness,
        metavar="SHAPE",
        help="of gamma arrivals: 1 is Poisson, less is burstier [%(default)g]",
    )
    add("--ramp-to", type=float, default=None, metavar="R", help="end rate of --arrivals ramp")
    add("--max-concurrency", type=int, default=None, metavar="N", help="of a closed loop")
    add("--trace", default=None, metavar="FILE", help="Azure .csv or Mooncake .jsonl")
    add(
        "--time-scale",
        type=float,
        default=_D.time_scale,
        metavar="X",
        help="replay a trace X times as fast [%(default)g]",
    )


def _add_contents(group: Any) -> None:
    add = group.add_argument
    add(
        "--prompts",
        choices=PROMPTS,
        default=_D.prompts,
        help="random tokens, a dataset's text, or the trace's lengths [%(default)s]",
    )
    add("--dataset", default=_D.dataset, help="for --prompts text [%(default)s]")
    add(
        "--input-length",
        default=_D.input_length,
        metavar="LENGTH",
        help="N, uniform:LOW:HIGH, normal:MEAN:STD, lognormal:MEDIAN:SIGMA [512]",
    )
    add("--output-length", default=_D.output_length, metavar="LENGTH", help="[%(default)s]")
    add(
        "--max-tokens",
        type=int,
        default=None,
        metavar="N",
        help="leave out trace entries with more tokens [the server's max_model_len]",
    )
    add(
        "--shared-prefix-length",
        type=int,
        default=0,
        metavar="N",
        help="tokens that prompts of a group begin with [%(default)s]",
    )
    add("--shared-prefix-groups", type=int, default=1, metavar="N", help="[%(default)s]")
    add("--kv-policy", default=None, help="eviction policy of every request [the server's]")
    add("--kv-sparsity", type=float, default=None, metavar="S")
    add("--kv-budget-tokens", type=int, default=None, metavar="TOKENS")
    add("--tokenizer", default=None, metavar="FOLDER", help="folder or hub id [the server's model]")
    add(
        "--vocab-size",
        type=int,
        default=None,
        metavar="N",
        help="random tokens lie below it; no tokenizer is loaded then",
    )


def _add_measures(group: Any) -> None:
    add = group.add_argument
    add(
        "--slo",
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help="objectives of a request, for goodput: time_to_first_token_ms:2000",
    )
    add(
        "--warm-up",
        dest="warm_up_s",
        type=float,
        default=0.0,
        metavar="S",
        help="first seconds that the steady figures leave out [0]",
    )
    add(
        "--cool-down",
        dest="cool_down_s",
        type=float,
        default=0.0,
        metavar="S",
        help="steady figures end so long before the last sending [0: at the end]",
    )
    add(
        "--sample-interval",
        dest="sample_interval_s",
        type=float,
        default=1.0,
        metavar="S",
        help="between samples of /metrics and memory [%(default)g]",
    )
    add("--server-pid", type=int, default=None, help="of a local server: sample its memory")
    add(
        "--quality-share",
        type=float,
        default=_Q.share,
        metavar="SHARE",
        help="of the requests that ask for prompt log-probs of known windows [0]",
    )
    add("--quality-dataset", default=DEFAULT_DATASET, help="[%(default)s]")
    add(
        "--quality-context-length",
        type=int,
        default=_Q.context_length,
        metavar="TOKENS",
        help="per window [%(default)s]",
    )
    add("--quality-windows", type=int, default=_Q.num_windows, metavar="N", help="[%(default)s]")
    add(
        "--quality-chunk",
        type=int,
        default=_Q.chunk,
        metavar="TOKENS",
        help="the server's --long-prefill-token-threshold [%(default)s]",
    )


def run(arguments: argparse.Namespace) -> int:
    """Load, write the record, say what happened."""
    from ..client.load_plan import make_plan
    from ..client.target import Texts, find_target
    from ..measure.load import run_load
    from ..records.output import RecordElsewhere, output_path, save_record
    from ..report.load_lines import load_lines

    specification = LoadSpecification.parse(_values(arguments))
    _check(arguments, specification)
    output = output_path(arguments.output)
    api_key = os.environ.get("OPENAI_API_KEY")
    target = asyncio.run(find_target(arguments.base_url, arguments.model, api_key))
    texts = Texts(arguments.tokenizer or target.root)
    vocabulary = arguments.vocab_size or (
        texts.vocabulary_size if specification.prompts != "text" else 1
    )
    plan = make_plan(specification, vocabulary, texts.tokens_of, target.max_model_len)
    outcome = run_load(
        specification, plan, target, server_pid=arguments.server_pid, api_key=api_key
    )
    unsaved = None
    try:
        save_record(output, outcome.record)
    except (RecordElsewhere, UnwritableFile) as error:
        unsaved = str(error)
    print("\n".join(load_lines(outcome.record)))
    if unsaved:
        print(f"kv-eviction: {unsaved}", file=sys.stderr)
    else:
        print(f"record: {output}")
    if outcome.stop_reason:
        print(
            f"kv-eviction: ended early: {outcome.stop_reason}; the record is kept", file=sys.stderr
        )
    counts = outcome.record["counts"]
    if outcome.interrupted:
        return 130
    return 1 if unsaved or counts["succeeded"] != counts["planned"] else 0


def _check(arguments: argparse.Namespace, specification: LoadSpecification) -> None:
    """Refuse what is wrong with settings that are no part of the load itself."""
    import psutil

    vocabulary, pid = arguments.vocab_size, arguments.server_pid
    if vocabulary is not None and vocabulary < 1:
        raise UsageError(f"--vocab-size is {vocabulary}; give a whole number of at least 1")
    if vocabulary is not None and specification.prompts == "text":
        raise UsageError("--vocab-size means nothing to --prompts text; leave it out")
    if vocabulary is not None and arguments.tokenizer and not specification.quality.share:
        raise UsageError("--vocab-size needs no tokenizer; leave out it or --tokenizer")
    if pid is not None and not (0 < pid < 2**31 and psutil.pid_exists(pid)):
        raise UsageError(f"--server-pid {pid} is no process of this machine")


def _values(arguments: argparse.Namespace) -> dict[str, Any]:
    settings = {
        name: value
        for name in ("kv_policy", "kv_sparsity", "kv_budget_tokens")
        if (value := getattr(arguments, name)) is not None
    }
    try:
        rate = float(arguments.request_rate)
    except ValueError:
        raise UsageError(
            f"--request-rate is {arguments.request_rate!r}; give a number or inf"
        ) from None
    names = set(LoadSpecification.__dataclass_fields__) - {"settings", "quality", "request_rate"}
    return {name: getattr(arguments, name) for name in names} | {
        "duration_s": arguments.duration_s,
        "request_rate": rate,
        "settings": settings,
        "quality": {
            "share": arguments.quality_share,
            "dataset": arguments.quality_dataset,
            "context_length": arguments.quality_context_length,
            "num_windows": arguments.quality_windows,
            "chunk": arguments.quality_chunk,
        },
    }
