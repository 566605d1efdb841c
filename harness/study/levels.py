"""Methods at sparsities or budgets: parsed, and refused where they would evict nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vllm_plugins.config import EvictionConfig
from vllm_plugins.parsing import parse_sparsity
from vllm_plugins.request_settings import GRANULARITIES, RequestSettings

from ..errors import UsageError
from ..inputs.tasks.sample import FILLED
from ..records.specifications import DENSE, STOCK
from .run import Budget, Method
from .specification import EngineSpecification, OfflineRun

_MAX_LENGTHENING = 64
"""A context this many times as long is no advice any more."""


def method_for(value: Any) -> Method:
    """A method as given: a policy's name, or ``{policy, name, args, granularity}``.

    Raises:
        UsageError: neither; or a name that no file can bear.

    """
    if isinstance(value, str):
        return Method(value, value)
    if not isinstance(value, dict) or "policy" not in value:
        raise UsageError(f"a method is {value!r}; give a policy's name or {{policy, name, args}}")
    unknown = set(value) - {"policy", "name", "args", "granularity"}
    if unknown:
        raise UsageError(
            f"a method has {sorted(unknown)}; it takes policy, name, args and granularity"
        )
    granularity = value.get("granularity")
    if granularity not in (None, *GRANULARITIES):
        raise UsageError(
            f"granularity of a method is {granularity!r}; use one of: {', '.join(GRANULARITIES)}"
        )
    args = value.get("args") or {}
    if not isinstance(args, dict):
        raise UsageError(f"args of a method are {args!r}; give a mapping of parameter to value")
    if args and value["policy"] == STOCK:
        raise UsageError("method stock is vLLM without the plugin and takes no args; drop them")
    parts = "-".join(map(str, [*args.values(), *filter(None, [granularity])]))
    name = str(value.get("name") or (f"{value['policy']}-{parts}" if parts else value["policy"]))
    if len(name) > 100 or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*(_[A-Za-z0-9.+-]+)*", name):
        raise UsageError(
            f"a method's name is {name!r:.60}; use letters, digits, '.', '+', '-' or '_', at most "
            "100 of them"
        )
    return Method(name, value["policy"], args, granularity)


def levels_for(
    methods: Sequence[Any], sparsities: Sequence[Any], budgets: Sequence[Any] = ()
) -> list[tuple[Method, Budget]]:
    """Every method under every budget of a comparison; ``dense`` and ``stock`` once.

    Raises:
        UsageError: nothing to run, or two methods of one name. ``EvictionConfigError``: a
        sparsity is out of range.

    """
    levels: list[tuple[Method, Budget]] = []
    for tokens in budgets:
        if type(tokens) is not int:
            raise UsageError(f"--budget-tokens is {tokens!r}; give whole numbers of tokens")
    for method in map(method_for, methods):
        if method.policy in (DENSE, STOCK):
            wanted = [Budget()]
        else:
            wanted = [Budget(parse_sparsity("sparsity", s)) for s in sparsities]
            wanted += [Budget(tokens=tokens) for tokens in budgets]
        levels += [(method, b) for b in wanted if (method, b) not in levels]
    if len({(method.name, budget) for method, budget in levels}) < len(levels):
        raise UsageError("two methods bear the same name; give them a name each")
    if not levels:
        raise UsageError("nothing to run; name at least one of --methods and one --sparsity")
    return levels


def check_levels(engine: EngineSpecification, runs: Sequence[OfflineRun]) -> None:
    """Refuse what the plugin would refuse, and what would evict nothing, before an engine starts.

    Raises:
        EvictionConfigError: a policy, parameter or budget is wrong. ``UsageError``: no block of a
            window would ever go, so the run would be dense under another name.

    """
    config = EvictionConfig.parse(engine.eviction)
    levels = {(json.dumps(run.settings), run.measurement.answer_tokens): run for run in runs}
    for run in levels.values():
        settings = config.request_settings(run.settings, engine.block_size)
        if settings.evicts and not _evicts(settings, engine, run.measurement.answer_tokens):
            raise UsageError(_evicts_nothing(run, settings))


def _evicts(settings: RequestSettings, engine: EngineSpecification, answer_tokens: int) -> bool:
    """Whether a block goes early enough for a token of a window, or of an answer, to miss it.

    The last decision that counts comes before the window's last step, and only full blocks go. A
    prompt's budget is that of all its tokens; a decode's is that of its tokens so far, of which
    the last is no input. An answer's steps come after its whole prompt.
    """
    length = engine.context_length
    if engine.protocol == "decode":
        processed = budgeted = length - 2
    elif answer_tokens > 1:  # the first one comes of the prompt's last step
        processed = budgeted = int(FILLED * (length - answer_tokens))
    else:
        processed = (length - 1) // engine.prefill_chunk * engine.prefill_chunk
        budgeted = length
    keep = settings.keep(budgeted, engine.block_size, engine.eviction["min_blocks"])
    if settings.rule is not None:
        keep += -(-engine.eviction["slack_tokens"] // engine.block_size)
    return processed // engine.block_size > keep


def _evicts_nothing(run: OfflineRun, settings: RequestSettings) -> str:
    engine = run.resource
    keep = settings.keep(engine.context_length, engine.block_size, engine.eviction["min_blocks"])
    asked = f"--sparsity {settings.sparsity:g}"
    if settings.budget_tokens is not None:
        asked = f"--budget-tokens {settings.budget_tokens}"
    answer = run.measurement.answer_tokens
    window = f"--context-length {engine.context_length}"
    window += f" beside an answer of {answer}" if answer > 1 else " before its last step"
    return (
        f"{run.method.name} with {asked} would evict nothing from a window of {window}, as {keep} "
        f"blocks of {engine.block_size} tokens stay; give "
        f"{' or '.join(_remedies(settings, engine, answer))}"
    )


def _remedies(
    settings: RequestSettings, engine: EngineSpecification, answer_tokens: int
) -> list[str]:
    """Flags that make a request evict, each by itself; of each the value nearest to what it is.
    Where none is enough alone, what to change together."""
    length, block, chunk = engine.context_length, engine.block_size, engine.prefill_chunk
    eviction = engine.eviction
    least, sinks = eviction["min_blocks"], eviction["sink_blocks"]
    packed = settings.rule is not None and eviction["slack_tokens"] > 0
    longer = range(length - length % block + block, _MAX_LENGTHENING * length, block)
    smaller = range(length // block - 1, sinks, -1) if settings.budget_tokens is not None else ()
    higher = (n / 10 for n in range(1, 10) if settings.budget_tokens is None)
    groups = (
        ((f"--context-length {n}", settings, replace(engine, context_length=n)) for n in longer),
        (
            (f"--sparsity {s}", replace(settings, sparsity=s), engine)
            for s in higher
            if s > settings.sparsity
        ),
        (
            (f"--budget-tokens {n * block}", replace(settings, budget_tokens=n * block), engine)
            for n in smaller
        ),
        (
            (f"--min-blocks {n}", settings, replace(engine, eviction={**eviction, "min_blocks": n}))
            for n in range(least - 1, max(1, sinks), -1)
        ),
        (
            (
                "--slack-tokens 0",
                settings,
                replace(engine, eviction={**eviction, "slack_tokens": n}),
            )
            for n in (0,)
            if packed
        ),
        (
            (f"--block-size {n}", settings, replace(engine, block_size=n))
            for n in (64, 32)
            if n < block
        ),
        (
            (f"--prefill-chunk {n}", settings, replace(engine, prefill_chunk=n))
            for n in (block,)
            if n < chunk
        ),
    )
    found = [
        next((f for f, asked, variant in group if _evicts(asked, variant, answer_tokens)), None)
        for group in groups
    ]
    alone = [flag for flag in found if flag]
    return alone or ["a longer --context-length and a higher --sparsity"]
