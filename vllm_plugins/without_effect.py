"""Settings that a server takes and nobody reads. No vLLM, no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from .config import SCORED_IN_FULL, EvictionConfig
from .parsing import EvictionConfigError
from .policies import get_policy, policy_names
from .request_settings import BLOCK, TOKEN, RequestSettings


@dataclass(frozen=True)
class _Readers:
    """Who reads a setting: requests of these granularities, of these needs where any are named."""

    granularities: tuple[str, ...]
    scored: bool = False

    def include(self, settings: RequestSettings) -> bool:
        needed = not self.scored or settings.gathers_attention
        return settings.evicts and settings.granularity in self.granularities and needed

    def __str__(self) -> str:
        who = "policies that score attention" if self.scored else "policies that evict"
        only = "" if len(self.granularities) > 1 else f" at {self.granularities[0]} granularity"
        return who + only


_BOTH = (BLOCK, TOKEN)
_READERS: Mapping[str, _Readers] = {
    "sink_blocks": _Readers((BLOCK,)),
    "sink_tokens": _Readers((TOKEN,)),
    "slack_tokens": _Readers((TOKEN,)),
    "min_blocks": _Readers(_BOTH),
    "layer_groups": _Readers(_BOTH),
    "score": _Readers(_BOTH, scored=True),
    "score_half_life": _Readers(_BOTH, scored=True),
    "score_queries": _Readers(_BOTH, scored=True),
    "score_query_stride": _Readers(_BOTH, scored=True),
    "score_prompt_stride": _Readers(_BOTH, scored=True),
    "score_layer_stride": _Readers((BLOCK,), scored=True),
}


def without_effect(config: EvictionConfig, given: Collection[str]) -> dict[str, str]:
    """Which of the settings that were ``given`` have no effect, on whom, and why.

    Returns:
        by setting, the rest of a sentence that begins with its name. A setting that the server's
        own policy does not read, but a request's may, is among them, unless the server leaves
        all evicting to its requests.

    """
    own = config.request_settings(None, None)
    offered = list(_offered(config))
    told = {}
    for name, readers in _READERS.items():
        if name not in given:
            continue
        if name == "score_half_life" and config.score != "decay":
            told[name] = f"has no effect: score is {config.score}, which has no half-life"
        elif name == "score_prompt_stride" and config.score == "decay":
            told[name] = "has no effect: with score decay every query is scored"
        elif name == "score_prompt_stride" and _few(config):
            told[name] = (
                f"has no effect: score_queries is {config.score_queries}, and the last "
                f"{SCORED_IN_FULL} queries of a chunk are all scored"
            )
        elif name == "min_blocks" and config.budget_tokens is not None:
            told[name] = (
                "has no effect on the server's own budget, which is absolute; it bounds what a "
                "request's sparsity leaves"
            )
        elif not readers.include(own):
            if not any(readers.include(settings) for settings in offered):
                told[name] = f"has no effect: {readers} read it, and this server offers none"
            elif own.evicts:
                told[name] = f"has no effect on the server's own policy: {readers} read it"
    unread = set(config.policy_args) - {config.policy, *_listed(config)}
    if "policy_args" in given and unread:
        told["policy_args"] = f"has no effect for {', '.join(sorted(unread))}: not offered here"
    return told


def _few(config: EvictionConfig) -> bool:
    return config.score_queries != "all" and int(config.score_queries) <= SCORED_IN_FULL


def _listed(config: EvictionConfig) -> Collection[str]:
    return policy_names() if config.request_policies == "any" else config.request_policies


def _offered(config: EvictionConfig) -> Iterator[RequestSettings]:
    """What requests may follow, at some budget."""
    budget = {} if config.request_budgets == "server" else {"kv_sparsity": 0.5}
    for name in {*_listed(config), config.policy}:
        if not get_policy(name).evicts:
            continue
        for granularity in config.granularities:
            extra = {"kv_policy": name, "kv_granularity": granularity, **budget}
            try:
                yield config.request_settings(extra, None)
            except EvictionConfigError:
                continue  # the policy has no such form
