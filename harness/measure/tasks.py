"""One run of a task on a running engine: raw record out, with every answer and its score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from ..analysis.task_scores import repetition, score
from ..inputs.tasks.sample import Sample
from ..records.common_fields import SAMPLES, stored_once
from ..records.head import record_head
from ..records.provenance import SCHEMA_VERSION
from ..resources.engine import Engine
from ..resources.scored import Answer
from ..study.specification import Answers, OfflineRun
from .foot import memory, run_foot

_SHOWN_CHARACTERS = 400
"""Of an answer, in a record. Scores are of the whole one."""


def measure_task(
    run: OfflineRun, engine: Engine, samples: Sequence[Sample], progress: Callable[[int], None]
) -> dict[str, Any]:
    """Answer a run's samples and score the answers.

    Raises:
        UnfaithfulRun: see ``Engine.answer``.

    """
    assert isinstance(run.measurement, Answers)
    requests = [(sample.prompt, sample.max_tokens) for sample in samples]
    seconds, answers = engine.answer(requests, run.settings, progress)
    entries = [
        {"place": place, **_entry(sample, answer)}
        for place, (sample, answer) in enumerate(zip(samples, answers, strict=True))
    ]
    records = [answer.record for answer in answers]
    scores = [entry["score"] for entry in entries if entry["score"] is not None]
    return {
        **record_head(run, SCHEMA_VERSION),
        "task": run.measurement.task,
        "score": fmean(scores) if scores else None,
        "ended_share": fmean(entry["ended"] for entry in entries),
        "mean_answer_tokens": fmean(entry["answer_tokens"] for entry in entries),
        "repetition": fmean(entry["repetition"] for entry in entries),
        **memory(engine, records),
        "avg_cache_size": fmean(record["average_blocks"] for record in records),
        "peak_cache_size": max(record["peak_blocks"] for record in records),
        "total_tokens": sum(e["prompt_tokens"] + e["answer_tokens"] for e in entries),
        "runtime_seconds": seconds,
        **run_foot(run, engine),
        **stored_once(entries, SAMPLES),
    }


def _entry(sample: Sample, answer: Answer) -> dict[str, Any]:
    asked = sample.metric is not None
    entry: dict[str, Any] = {
        "score": score(sample.metric, answer.text, sample.expected) if sample.metric else None,
        "metric": sample.metric,
        "expected": list(sample.expected),
        "answer": answer.text[:_SHOWN_CHARACTERS],
        "prompt_tokens": len(sample.prompt),
        **({"cached_tokens": answer.cached_tokens} if answer.cached_tokens else {}),
        "answer_tokens": len(answer.token_ids),
        "ended": answer.ended,
        "repetition": repetition(answer.token_ids),
        "eviction": answer.record,
    }
    # Where nothing is right or wrong, answers are compared with dense's, token by token.
    return entry if asked else {**entry, "token_ids": answer.token_ids}
