"""From a study's settings to the runs they make, completely specified."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from vllm_plugins.config import EvictionConfig
from vllm_plugins.policies.base import shown
from vllm_plugins.request_settings import DEFAULT_GRANULARITY

from ..errors import UsageError
from ..inputs.corpora import describe
from ..inputs.models import fingerprint, recorded_name, resolve_model
from ..inputs.tasks.sample import CACHED
from ..inputs.text import Text
from ..records.specifications import DENSE, PERPLEXITY, STOCK
from .levels import check_levels, levels_for
from .points import Comparison, comparisons_of
from .run import Budget, Method, Run
from .settings import EVICTION, Study, short_name
from .specification import Answers, EngineSpecification, Load, OfflineRun, Perplexity, Throughput
from .tasks import tasks_of

MOST_RUNS = 10_000
"""Of one method at one level: far more than anybody waits for."""


def comparisons(study: Study, folder: Path, device: str) -> list[Comparison]:
    """The runs of a study, completely specified.

    Args:
        study: the settings.
        folder: of the experiment; a study that varies something has a folder below per point.
        device: ``cpu`` or ``cuda``; settles the defaults that differ.

    Raises:
        UsageError: a setting, model or text is wrong. ``EvictionConfigError``: of the plugin.

    """
    text_of = cache(describe)  # local files are read whole for their hash: once, not per point
    plain = _settings(replace(study, vary={}))
    return comparisons_of(
        study.vary,
        folder,
        lambda varied: _runs(Study.parse({**plain, **varied}), device, text_of),
        _shown,
    )


def seeds_for(num_runs: int | None, seeds: Sequence[int] | None) -> tuple[int, ...]:
    """Seeds of the runs: as given, or 0, 1, ... for ``num_runs``.

    Raises:
        UsageError: the two contradict each other, there are too many runs, or a seed is repeated or
            negative.

    """
    if seeds is None:
        if num_runs is not None and not 1 <= num_runs <= MOST_RUNS:
            raise UsageError(f"--num-runs is {shown(num_runs)}; give 1 to {MOST_RUNS:,}")
        return tuple(range(num_runs if num_runs is not None else 1))
    if num_runs is not None and num_runs != len(seeds):
        raise UsageError(f"--num-runs is {num_runs} but --seeds names {len(seeds)}; drop one")
    whole = all(type(seed) is int and seed >= 0 for seed in seeds)
    if not seeds or not whole or len(set(seeds)) != len(seeds):
        raise UsageError("--seeds must be different whole numbers of at least 0")
    return tuple(seeds)


def _shown(name: str, value: Any) -> Any:
    if name == "dataset":
        return short_name(value)
    return recorded_name(value) if name == "model" else value


def _settings(study: Study) -> dict[str, Any]:
    return {f.name: getattr(study, f.name) for f in fields(study)}


def _runs(
    study: Study, device: str, text_of: Callable[[str, str | None, str], Text]
) -> list[OfflineRun]:
    from vllm_plugins.refusals.engine import check_block_size

    seeds = seeds_for(study.num_runs, study.seeds)
    levels = levels_for(study.methods, study.sparsity, study.budget_tokens)
    if any(method.policy == STOCK for method, _ in levels):
        raise UsageError(
            "method stock is vLLM without the plugin, which keeps no score of windows; give dense, "
            "or measure stock with kv-eviction bench or serve-sweep"
        )
    check_block_size(study.block_size)
    _check_window(study)
    if study.protocol == "decode" and device != "cuda":
        raise UsageError(
            "--protocol decode forces tokens through vLLM's Model Runner V2, which only CUDA "
            "has; use --protocol chunked"
        )
    eviction = EvictionConfig.parse(
        {"policy": "dense", **{name: getattr(study, name) for name in EVICTION}}
    )
    eviction, levels = _settled(eviction, levels)
    path = resolve_model(study.model)
    max_num_seqs = max(2, study.max_num_seqs)
    pool = study.kv_pool_windows or max_num_seqs
    engine = EngineSpecification(
        model=recorded_name(study.model),
        model_fingerprint=fingerprint(path),
        context_length=study.context_length,
        prefill_chunk=study.prefill_chunk,
        block_size=study.block_size,
        max_num_seqs=max(max_num_seqs, pool),
        kv_pool_windows=max(2, pool),
        enforce_eager=study.enforce_eager if study.enforce_eager is not None else device != "cuda",
        dtype=study.dtype or ("auto" if device == "cuda" else "float32"),
        protocol=study.protocol,
        eviction=eviction.to_dict(),
        kv_cache_dtype=study.kv_cache_dtype,
        prefix_caching=study.task_prefix == CACHED,
        model_path=path,
    )
    text = text_of(study.dataset, study.text_column, study.document_mode)
    measured: list[Perplexity | Answers] = [*tasks_of(study, text)]
    if study.measures_perplexity:
        measured.insert(0, Perplexity(text, study.num_samples, study.min_context))
    runs: list[OfflineRun] = [
        Run(engine, method, budget, seed, measurement)
        for seed in seeds
        for measurement in measured
        for method, budget in levels
    ]
    check_levels(engine, runs)
    if study.throughput:
        throughput = Throughput(text, _load(study, engine))
        runs += [
            replace(run, measurement=throughput)
            for run in runs
            if run.kind == PERPLEXITY and run.seed in seeds[: study.load_runs]
        ]
    return runs


def _settled(
    eviction: EvictionConfig, levels: Sequence[tuple[Method, Budget]]
) -> tuple[EvictionConfig, list[tuple[Method, Budget]]]:
    """Engine and methods without a default: records say what was measured, whatever the defaults
    are by then. Where all methods have one granularity it is the engine's, else their own."""
    granularities = [eviction.granularity_of(m.policy, m.args, m.granularity) for m, _ in levels]
    evicting = {g for g, (m, _) in zip(granularities, levels, strict=True) if m.policy != DENSE}
    evicting = evicting or set(granularities)
    if len(evicting) == 1 and not any(method.granularity for method, _ in levels):
        (granularity,) = evicting
        score = eviction.score_at(granularity)
        settled = replace(
            eviction, granularity=granularity, score=score, request_granularity="server"
        )
        return settled, list(levels)
    if eviction.granularity != DEFAULT_GRANULARITY:
        return eviction, list(levels)
    own = [
        (m if m.policy == DENSE else replace(m, granularity=g), budget)
        for g, (m, budget) in zip(granularities, levels, strict=True)
    ]
    return eviction, own


def _check_window(study: Study) -> None:
    """Refuse lengths that do not fit into a window, of one point of a study."""
    length = study.context_length
    if study.min_context >= length:
        raise UsageError(
            f"--min-context {study.min_context} leaves no token of a window of "
            f"{length} to score; lower it"
        )
    for flag, value in (
        ("--prefill-chunk", study.prefill_chunk),
        ("--block-size", study.block_size),
    ):
        if value > length:
            raise UsageError(
                f"{flag} {value} is longer than a window of --context-length {length}; "
                "lower the one or raise the other"
            )


def _load(study: Study, engine: EngineSpecification) -> Load:
    output = study.load_output_tokens or max(1, study.context_length // 8)
    if output >= study.context_length:
        raise UsageError(
            f"--load-output-tokens {output} leaves no prompt in a context of "
            f"{study.context_length}; lower it"
        )
    requests = study.load_requests or 2 * engine.max_num_seqs
    return Load(requests, study.context_length - output, output)
