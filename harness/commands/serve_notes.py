"""What ``kv-eviction serve`` says of its settings before the engine starts. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_plugins.config import SCORED_IN_FULL, EvictionConfig
from vllm_plugins.parsing import flag
from vllm_plugins.policies import ATTENTION, GRAPH, TOKEN_MASS, TOKEN_PEAK
from vllm_plugins.request_settings import TOKEN, RequestSettings
from vllm_plugins.without_effect import without_effect


def settings_notes(
    config: EvictionConfig, given: Mapping[str, Any], block_size: int, max_model_len: int | None
) -> list[str]:
    """A sentence each: budget, slack, scores, what requests may choose, what changes nothing.

    Args:
        config: of the server.
        given: settings that the user named.
        block_size: tokens per block.
        max_model_len: tokens of the longest request; None: not known here.

    """
    own = config.request_settings(None, block_size)
    notes = []
    if own.evicts:
        notes += [_budget(config, own, block_size, max_model_len), _scores(config, own)]
    notes.append(_requests(config))
    for name, reason in without_effect(config, given).items():
        notes.append(f"{flag(name)} {reason}")
    return notes


def _budget(
    config: EvictionConfig, own: RequestSettings, block_size: int, max_model_len: int | None
) -> str:
    slack = config.slack(block_size) * block_size
    packed = (
        f"; at token granularity it is packed when it holds {slack:,} tokens more (slack)"
        if own.granularity == TOKEN
        else "; at block granularity there is no slack"
    )
    if max_model_len is None and own.budget_tokens is None:
        return (
            f"a request keeps at least {config.min_blocks} blocks of {block_size} tokens, and "
            f"{1 - own.sparsity:.4g} of its own{packed}"
        )
    blocks = own.keep(max_model_len or 0, block_size, config.min_blocks)
    length = "" if max_model_len is None else f" of {max_model_len:,} tokens"
    return (
        f"a request{length} keeps at most {blocks * block_size:,} tokens, {blocks:,} blocks of "
        f"{block_size}{packed}"
    )


def _scores(config: EvictionConfig, own: RequestSettings) -> str:
    if not own.needs & {ATTENTION, GRAPH, TOKEN_MASS, TOKEN_PEAK}:
        return f"policy {own.policy} reads no attention scores, so none are summed for it"
    score = config.score_at(own.granularity)
    how = {
        "sum": "summed over queries",
        "mean": "averaged over the queries that saw it",
        "decay": f"summed with a half-life of {config.score_half_life:,} tokens",
    }[score]
    most = config.score_queries if own.window is None else own.window
    queries = (
        "all of a chunk's queries are scored"
        if most == "all"
        else f"the last {most:,} queries of a chunk are scored"
    )
    sampled = config.prompt_stride
    whole = own.window is not None or GRAPH in own.needs
    if sampled > 1 and not whole and (most == "all" or int(most) > SCORED_IN_FULL):
        queries += f" (before its last {SCORED_IN_FULL} one in {sampled})"
    stride, layers = config.score_query_stride, config.score_layer_stride
    every = stride == 1 or own.window == 1
    decodes = "each of a decode" if every else f"of a decode one in {stride}"
    what = "token" if own.granularity == TOKEN else "block"
    where = "in every layer" if what == "token" or layers == 1 else f"in one layer of {layers}"
    return f"the attention of each {what} is {how}; {queries}, {decodes}, {where}"


def _requests(config: EvictionConfig) -> str:
    listed = config.request_policies
    others = [] if listed == "any" else sorted({*listed} - {config.policy})
    policies = "any policy" if listed == "any" else ", ".join(others) or "no other policy"
    budgets = (
        "no more than the server's budget, by which memory is planned"
        if config.request_budgets == "server"
        else "any budget, so memory is planned by length"
    )
    granularity = "any" if config.request_granularity == "any" else "no other"
    return f"requests may choose {policies}; {budgets}; {granularity} granularity"
