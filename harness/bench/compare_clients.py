"""Our client against ``vllm bench serve``, on one running server: ``scripts/compare_clients``.

The same load (number and lengths of requests; a constant rate, or so many in flight) is sent by
either in turn. Both have random prompts of their own; what must agree are the medians of time to
first token and time per output token, and the output throughput. Near saturation an open loop
amplifies any disturbance of the machine; a closed one does not.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from ..client.load_plan import make_plan
from ..client.load_settings import LoadSpecification
from ..client.target import Target, Texts, find_target
from ..errors import UsageError
from ..measure.load import run_load
from ..measure.load_record import load_provenance
from ..records.files import read_json, write_json
from ..records.output import output_path
from ..records.provenance import timestamp

SCHEMA_VERSION = 1
_FIELDS = {
    "time_to_first_token_ms.p50": "median_ttft_ms",
    "time_per_output_token_ms.p50": "median_tpot_ms",
    "output_throughput": "output_throughput",
}
# The command `vllm` of the CPU build does not start (see ``server.vllm_command``).
_BENCH = (
    "import argparse; from vllm.benchmarks import serve; parser = argparse.ArgumentParser();"
    "serve.add_cli_args(parser); serve.main(parser.parse_args())"
)


def ours(specification: LoadSpecification, target: Target, texts: Texts) -> dict[str, float]:
    """One run of our client."""
    plan = make_plan(specification, texts.vocabulary_size, texts.tokens_of, target.max_model_len)
    record = run_load(specification, plan, target, progress=False, api_key=_api_key()).record
    assert record["counts"]["succeeded"] == specification.num_requests, record["failures"]
    summary = record["summary"]["all"]
    if summary["output_throughput"] is None:
        raise UsageError(f"the server at {target.base_url} sends no usage to compare with")
    return {
        "time_to_first_token_ms.p50": summary["time_to_first_token_ms"]["p50"],
        "time_per_output_token_ms.p50": summary["time_per_output_token_ms"]["p50"],
        "output_throughput": summary["output_throughput"],
        "send_lag_ms.p50": summary["send_lag_ms"]["p50"],
    }


def theirs(arguments: argparse.Namespace, target: Target, seed: int) -> dict[str, float]:
    """One run of ``vllm bench serve``."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-c",
            _BENCH,
            "--backend",
            "openai",
            "--base-url",
            target.base_url,
            "--model",
            target.model,
            "--tokenizer",
            target.root,
            "--endpoint",
            "/v1/completions",
            "--dataset-name",
            "random",
            "--random-input-len",
            str(arguments.input_length),
            "--random-output-len",
            str(arguments.output_length),
            "--ignore-eos",
            "--num-prompts",
            str(arguments.num_requests),
            "--seed",
            str(seed),
            *_load_flags(arguments),
            "--temperature",
            "0",
            "--save-result",
            "--result-dir",
            folder,
            "--result-filename",
            "result.json",
            "--disable-tqdm",
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        result = read_json(Path(folder) / "result.json")
    assert result["completed"] == arguments.num_requests
    return {name: result[field] for name, field in _FIELDS.items()}


def _load_flags(arguments: argparse.Namespace) -> list[str]:
    if arguments.max_concurrency:
        return ["--max-concurrency", str(arguments.max_concurrency)]
    return ["--request-rate", str(arguments.request_rate), "--burstiness", "1000000"]


def _load(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.max_concurrency:
        return {"arrivals": "closed", "max_concurrency": arguments.max_concurrency}
    return {"arrivals": "constant", "request_rate": arguments.request_rate}


def _api_key() -> str | None:
    """Where ``vllm bench serve`` has it from, too."""
    return os.environ.get("OPENAI_API_KEY")


def main() -> int:
    """Alternate, compare, write the record; 1 where they differ by more than 5%, 2 where the
    arguments or the server will not do."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--num-requests", type=int, default=40)
    parser.add_argument("--request-rate", type=float, default=1.0)
    parser.add_argument("--max-concurrency", type=int, help="a closed loop, instead of a rate")
    parser.add_argument("--input-length", type=int, default=128)
    parser.add_argument("--output-length", type=int, default=32)
    arguments = parser.parse_args()
    try:
        return _compare(arguments)
    except UsageError as error:
        print(f"compare_clients: {error}", file=sys.stderr)
        return 2


def _compare(arguments: argparse.Namespace) -> int:
    if arguments.runs < 1 or arguments.output_length < 2:
        raise UsageError("--runs must be at least 1 and --output-length at least 2 tokens")
    output_path(arguments.output)
    target = asyncio.run(find_target(arguments.base_url, None, _api_key()))
    texts = Texts(target.root)
    pairs: list[dict[str, Any]] = []
    for seed in range(arguments.runs):
        specification = LoadSpecification.parse(
            {
                "num_requests": arguments.num_requests,
                **_load(arguments),
                "input_length": arguments.input_length,
                "output_length": arguments.output_length,
                "seed": seed,
            }
        )
        pairs.append(
            {"ours": ours(specification, target, texts), "theirs": theirs(arguments, target, seed)}
        )
        print(pairs[-1], flush=True)
    agreement = {}
    for name in _FIELDS:
        mine, other = (median(pair[who][name] for pair in pairs) for who in ("ours", "theirs"))
        agreement[name] = {"ours": mine, "theirs": other, "difference": mine / other - 1}
    write_json(
        arguments.output,
        {
            "schema_version": SCHEMA_VERSION,
            "kind": "agreement",
            "timestamp": timestamp(),
            "against": "vllm bench serve",
            "load": {k: v for k, v in vars(arguments).items() if k not in ("base_url", "output")},
            "target": {k: v for k, v in target.to_dict().items() if k != "base_url"},
            "medians_over_runs": agreement,
            "runs": pairs,
            **load_provenance(),
        },
    )
    for name, row in agreement.items():
        print(f"{name:30} {row['ours']:10.2f} {row['theirs']:10.2f} {row['difference']:+8.1%}")
    return 0 if all(abs(row["difference"]) <= 0.05 for row in agreement.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
