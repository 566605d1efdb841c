"""``kv-eviction offline``: methods at sparsities on one engine."""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllm_plugins.config import SCORES, EvictionConfig
from vllm_plugins.policies import policy_names

from ..corpora import DEFAULT_DATASET
from ..errors import UsageError
from ..models import DEFAULT_MODEL


def add_parser(commands: Any) -> None:
    """Add the subcommand to ``commands`` (of ``ArgumentParser.add_subparsers``)."""
    defaults = EvictionConfig()
    offline = commands.add_parser(
        "offline",
        help="perplexity, memory and speed of methods at sparsities, on one engine",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = offline.add_argument
    add("--model", default=DEFAULT_MODEL, help="embedded name, folder, or Hugging Face id")
    add("--methods", nargs="+", default=["dense", "h2o", "cab"], metavar="METHOD",
        help=f"of: {', '.join(policy_names())}")  # fmt: skip
    add("--sparsity", nargs="+", default=["0.5", "0.9"], metavar="S",
        help="share of KV blocks evicted, 0 <= S < 1")  # fmt: skip
    add("--dataset", default=DEFAULT_DATASET,
        help="canterbury, wikitext, pg19, arxiv, text:FILE, or a name for `datasets`")  # fmt: skip
    add("--context-length", type=int, default=1024, metavar="TOKENS", help="tokens per window")
    add("--num-samples", type=int, default=8, metavar="N", help="windows per run")
    add("--num-runs", type=int, default=None, metavar="N", help="runs, on seeds 0, 1, ... [1]")
    add("--seeds", type=int, nargs="+", default=None, metavar="SEED", help="seeds of the runs")
    add("--experiment-name", default=None, metavar="NAME", help="folder of this experiment [time]")
    add("--output-dir", type=Path, default=Path("runs"), metavar="DIR", help="where it goes")
    add("--prefill-chunk", type=int, default=64, metavar="TOKENS",
        help="tokens a window advances between evictions; part of every result")  # fmt: skip
    add("--block-size", type=int, default=32, metavar="TOKENS", help="tokens per KV block")
    add("--max-num-seqs", type=int, default=8, metavar="N", help="windows in flight")
    add("--layer-groups", type=int, default=defaults.layer_groups, metavar="G",
        help="groups of layers with victims of their own")  # fmt: skip
    add("--score", choices=SCORES, default=defaults.score, help="how attention mass adds up")
    add("--score-half-life", type=int, default=defaults.score_half_life, metavar="TOKENS",
        help="for --score decay")  # fmt: skip
    add("--score-queries", default=str(defaults.score_queries), metavar="all|W",
        help="score all queries of a chunk, or its last W")  # fmt: skip
    add("--sink-blocks", type=int, default=defaults.sink_blocks, metavar="N",
        help="first blocks that are never evicted")  # fmt: skip
    add("--policy-args", default="{}", metavar="JSON",
        help='parameters by method, {"cab": {"bridge_definition": "forman"}}')  # fmt: skip
    offline.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the comparison and sum it up."""
    from tqdm import tqdm

    from ..aggregate import aggregate, significance
    from ..evaluate import evaluate
    from ..records import write_json
    from ..report import caption, plot_perplexity, text_table
    from ..specification import runs_for, seeds_for

    seeds = seeds_for(arguments.num_runs, arguments.seeds)
    runs = runs_for(
        _engine_specification(arguments),
        arguments.methods,
        arguments.sparsity,
        arguments.dataset,
        arguments.num_samples,
        seeds,
    )
    name = arguments.experiment_name or datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    folder = arguments.output_dir / name
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} holds an experiment already; give another --experiment-name")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}") from None
    total = sum(run.num_samples for run in runs)
    with tqdm(total=total, unit="window", desc="engine starts", dynamic_ncols=True) as bar:

        def progress(key: str, finished: int) -> None:
            bar.set_description(key, refresh=False)
            bar.update(finished)

        records = evaluate(runs, folder, progress)
    results = aggregate(records)
    write_json(folder / "aggregated_results.json", results)
    write_json(folder / "significance_tests.json", significance(records))
    plot_perplexity(results, folder / "perplexity.png", caption(records[0]))
    print(f"\n{caption(records[0])}, {len(seeds)} run(s)\n\n{text_table(results)}\n")
    print(f"records and perplexity.png: {folder}")
    return 0


def _engine_specification(arguments: argparse.Namespace) -> Any:
    from vllm_plugins.checks import check_block_size

    from ..specification import EngineSpecification

    for name in ("prefill_chunk", "max_num_seqs", "num_samples"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1")
    if arguments.context_length < 2:
        raise UsageError("--context-length must be at least 2 tokens")
    check_block_size(arguments.block_size)
    try:
        policy_args = json.loads(arguments.policy_args)
    except json.JSONDecodeError as error:
        raise UsageError(f"--policy-args is not JSON: {error}") from None
    config = EvictionConfig.parse(
        {
            "policy": "dense",
            "policy_args": policy_args,
            "layer_groups": arguments.layer_groups,
            "score": arguments.score,
            "score_half_life": arguments.score_half_life,
            "score_queries": arguments.score_queries,
            "sink_blocks": arguments.sink_blocks,
        }
    )
    return EngineSpecification(
        model=arguments.model,
        context_length=arguments.context_length,
        prefill_chunk=arguments.prefill_chunk,
        block_size=arguments.block_size,
        max_num_seqs=min(arguments.max_num_seqs, max(2, arguments.num_samples)),
        eviction=config.to_dict(),
    )
