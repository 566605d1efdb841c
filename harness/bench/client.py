"""How many requests per second the client itself can send on time: ``scripts/bench_client``.

A stub server on the loopback answers at once, in a process of its own; what is measured is the
*send lag*, from a request's intended time to its body's going to the socket. The record holds one
entry per rate and the highest rate whose median lag stays under a millisecond.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..client.load_plan import make_plan
from ..client.load_settings import LoadSpecification
from ..client.target import Target, find_target
from ..errors import UsageError
from ..measure.load import run_load
from ..measure.load_record import LAG_LIMIT_MS, load_provenance
from ..records.files import write_json
from ..records.output import output_path
from ..records.provenance import timestamp

SCHEMA_VERSION = 1


def load(rate: float, seconds: float, tokens: int) -> LoadSpecification:
    """A Poisson load of ``rate`` requests per second.

    Raises:
        UsageError: it cannot be one.

    """
    return LoadSpecification.parse(
        {
            "duration_s": seconds,
            "request_rate": rate,
            "input_length": 128,
            "output_length": tokens,
            "timeout_s": 30.0,
        }
    )


def measure(rate: float, seconds: float, tokens: int, target: Target) -> dict[str, Any]:
    """One load; what came of it."""
    specification = load(rate, seconds, tokens)
    plan = make_plan(specification, 32_000, lambda dataset: [])
    record = run_load(specification, plan, target, progress=False).record
    summary = record["summary"]["all"]
    return {
        "request_rate": rate,
        "counts": record["counts"],
        "request_throughput": summary["request_throughput"],
        "send_lag_ms": summary["send_lag_ms"],
        "time_to_first_token_ms": summary["time_to_first_token_ms"],
        "end_to_end_latency_ms": summary["end_to_end_latency_ms"],
        "warnings": record["warnings"],
    }


def main() -> int:
    """Measure every rate and write the record; 2 where the arguments will not do."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rates", type=float, nargs="+", default=[500, 1000, 2000, 3000, 4000])
    parser.add_argument("--seconds", type=float, default=10.0, help="per rate")
    parser.add_argument("--tokens", type=int, default=8, help="chunks per answer")
    arguments = parser.parse_args()
    try:
        output_path(arguments.output)
        for rate in arguments.rates:
            load(rate, arguments.seconds, arguments.tokens)
    except UsageError as error:
        print(f"bench_client: {error}", file=sys.stderr)
        return 2
    command = [sys.executable, "-m", "harness.bench.stub", "--tokens", str(arguments.tokens)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as stub:
        try:
            assert stub.stdout is not None
            target = asyncio.run(
                find_target(f"http://127.0.0.1:{int(stub.stdout.readline())}", None)
            )
            load_average = os.getloadavg()[0]
            measure(500, 2.0, arguments.tokens, target)  # connections, caches
            runs = []
            for rate in arguments.rates:
                runs.append(measure(rate, arguments.seconds, arguments.tokens, target))
                lag = runs[-1]["send_lag_ms"]
                print(f"{rate:6g}/s: send lag {lag['p50']:.3f} ms median, {lag['p99']:.3f} ms p99")
        finally:
            stub.kill()
    kept = [run["request_rate"] for run in runs if run["send_lag_ms"]["p50"] < LAG_LIMIT_MS]
    write_json(
        arguments.output,
        {
            "schema_version": SCHEMA_VERSION,
            "kind": "client",
            "timestamp": timestamp(),
            "limit_ms": LAG_LIMIT_MS,
            "highest_rate_within_limit": max(kept, default=None),
            "load_average_before": load_average,
            "chunks_per_answer": arguments.tokens,
            "seconds_per_rate": arguments.seconds,
            "runs": runs,
            **load_provenance(),
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
