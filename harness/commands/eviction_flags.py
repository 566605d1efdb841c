"""Flags for the eviction settings of an engine, and their values."""

from __future__ import annotations

import argparse
import json
from typing import Any

from vllm_plugins.config import SCORES
from vllm_plugins.parsing import RENAMED, check_renamed
from vllm_plugins.request_settings import DEFAULT_GRANULARITY, GRANULARITIES

from ..errors import UsageError

_COUNT = {"type": int, "metavar": "N"}
_FLAGS: dict[str, tuple[str, dict[str, Any]]] = {
    "granularity": (
        "token: every head keeps its own tokens; block: one set of blocks for all heads; default: "
        "token where the policy can",
        {"choices": (DEFAULT_GRANULARITY, *GRANULARITIES)},
    ),
    "layer_groups": ("groups of layers with victims of their own", {"type": int, "metavar": "G"}),
    "score": ("how attention mass adds up", {"choices": SCORES}),
    "score_half_life": ("for --score decay", {"type": int, "metavar": "TOKENS"}),
    "score_queries": ("score all queries of a chunk, or its last W", {"metavar": "all|W"}),
    "score_query_stride": ("during decode score every N-th query, N times", _COUNT),
    "score_prompt_stride": ("of a prompt score every N-th query, N times", _COUNT),
    "score_layer_stride": ("score every N-th layer of a group", _COUNT),
    "sink_blocks": ("first blocks that are never evicted", _COUNT),
    "sink_tokens": ("the same in tokens, at token granularity", _COUNT),
    "slack_tokens": ("tokens over budget at which heads are packed", _COUNT),
    "min_blocks": ("no relative budget is smaller", _COUNT),
}


def add_eviction_flags(parser: argparse.ArgumentParser, defaults: Any) -> None:
    """Add a flag for each setting that applies to all requests of an engine.

    None has a default of its own: what is not given is left to ``defaults``, an ``EvictionConfig``
    or a ``Study``, whose values the help shows.
    """
    for name, (text, options) in _FLAGS.items():
        flag = _flag(name)
        shown = f"{text} [{getattr(defaults, name)}]"
        parser.add_argument(flag, default=argparse.SUPPRESS, help=shown, **options)
    for name in RENAMED:  # known, so that ``eviction_settings`` can say what they are called now
        parser.add_argument(
            _flag(name), nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    parser.add_argument(
        "--policy-args",
        default=argparse.SUPPRESS,
        metavar="JSON",
        help='parameters by policy, {"cab": {"bridge_definition": "forman"}}',
    )


def eviction_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The values of the flags that were given, as ``EvictionConfig.parse`` takes them.

    Raises:
        UsageError: ``--policy-args`` is not JSON. ``EvictionConfigError``: a flag was given under
            its former name.

    """
    given = vars(arguments)
    check_renamed(given)
    settings = {name: given[name] for name in _FLAGS if name in given}
    if "policy_args" in given:
        try:
            settings["policy_args"] = json.loads(given["policy_args"])
        except json.JSONDecodeError as error:
            raise UsageError(f"--policy-args is not JSON: {error}") from None
    return settings


def _flag(setting: str) -> str:
    return "--" + setting.replace("_", "-")
