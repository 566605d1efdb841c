"""Flags for the server-wide eviction settings, and their values."""

from __future__ import annotations

import argparse
import json
from typing import Any

from vllm_plugins.config import SCORES, EvictionConfig

from ..errors import UsageError

_NAMES = (
    "layer_groups",
    "score",
    "score_half_life",
    "score_queries",
    "sink_blocks",
    "min_blocks",
)


def add_eviction_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each setting that applies to all requests of an engine."""
    defaults = EvictionConfig()
    add = parser.add_argument
    add("--policy-args", default="{}", metavar="JSON",
        help='parameters by policy, {"cab": {"bridge_definition": "forman"}}')  # fmt: skip
    add("--layer-groups", type=int, default=defaults.layer_groups, metavar="G",
        help=f"groups of layers with victims of their own [{defaults.layer_groups}]")  # fmt: skip
    add("--score", choices=SCORES, default=defaults.score,
        help=f"how attention mass adds up [{defaults.score}]")  # fmt: skip
    add("--score-half-life", type=int, default=defaults.score_half_life, metavar="TOKENS",
        help=f"for --score decay [{defaults.score_half_life}]")  # fmt: skip
    add("--score-queries", default=str(defaults.score_queries), metavar="all|W",
        help=f"score all queries of a chunk, or its last W [{defaults.score_queries}]")  # fmt: skip
    add("--sink-blocks", type=int, default=defaults.sink_blocks, metavar="N",
        help=f"first blocks that are never evicted [{defaults.sink_blocks}]")  # fmt: skip
    add("--min-blocks", type=int, default=defaults.min_blocks, metavar="N",
        help=f"no relative budget is smaller [{defaults.min_blocks}]")  # fmt: skip


def eviction_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The values of these flags, as ``EvictionConfig.parse`` takes them."""
    try:
        policy_args = json.loads(arguments.policy_args)
    except json.JSONDecodeError as error:
        raise UsageError(f"--policy-args is not JSON: {error}") from None
    return {"policy_args": policy_args} | {name: getattr(arguments, name) for name in _NAMES}
