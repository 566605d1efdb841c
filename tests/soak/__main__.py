"""Soak both engines, half of the time each, and write a record.

    python -m tests.soak --minutes 30 --seed 0 --output results/soak/cpu.json

Status 1: something does not hold; it is the last line of standard error, and in the record.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from typing import Any

# oneDNN keeps what it compiled for the last 1,024 shapes of a batch, a tenth of a MiB each: without
# this its memory grows for the first half hour, and a leak of ours would not be seen.
os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "1"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

from harness.bench.output import output_file
from harness.records.output import save_record
from harness.records.provenance import SCHEMA_VERSION, provenance, timestamp

from ..engine.conftest import end, make_tiny, save_tiny
from .soak import ENGINES, Soak, SoakedEngine

GROWTH_MIB = 8.0
"""More than this between the second third of the rounds and the last is a leak."""


def soak_engine(
    soaked: SoakedEngine, folder: str, seed: int, rounds: int | None, seconds: float
) -> tuple[dict[str, Any], str | None]:
    """What happened, and what does not hold, if anything."""
    engine, settings = soaked.arguments()
    llm = make_tiny(folder, engine, **settings)
    soak, failure = Soak(llm, soaked, seed), None
    deadline = time.monotonic() + seconds
    try:
        while soak.counts["rounds"] < rounds if rounds else time.monotonic() < deadline:
            soak.round()
            print(f"{soaked.name}: {dict(soak.counts)}", file=sys.stderr, flush=True)
        growth = soak.memory_growth_mib()
        if growth > GROWTH_MIB:
            failure = f"memory grows: by {growth:.1f} MiB"
    except AssertionError as error:
        failure = f"round {soak.counts['rounds']}: {error}"
    if failure:
        print(f"{soaked.name}: {failure}", file=sys.stderr, flush=True)
    report = soak.report()
    end(llm)
    return report, failure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="of both engines together")
    parser.add_argument("--rounds", type=int, help="of each engine, in place of minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=output_file, required=True)
    arguments = parser.parse_args()
    reports, failures = [], []
    with tempfile.TemporaryDirectory() as folder:
        save_tiny(folder)
        for soaked in ENGINES:
            seconds = 60 * arguments.minutes / len(ENGINES)
            report, failure = soak_engine(soaked, folder, arguments.seed, arguments.rounds, seconds)
            reports.append(report)
            if failure:
                failures.append(f"{soaked.name}, seed {arguments.seed}, {failure}")
    record = {
        "schema_version": SCHEMA_VERSION,
        "timestamp": timestamp(),
        "benchmark": "soak",
        "seed": arguments.seed,
        "failures": failures,
        "engines": reports,
        **provenance([]),
    }
    save_record(arguments.output, record)
    print("\n".join(failures), file=sys.stderr)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
