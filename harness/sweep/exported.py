"""The windows of a study for a program that knows nothing of this one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..inputs.windows import tokens_sha256
from ..study.plan import comparisons
from ..study.settings import Study
from ..study.specification import OfflineRun, Perplexity
from .texts import Texts

SCHEMA_VERSION = 1


def exported_windows(study: Study) -> dict[str, Any]:
    """Token ids of every window that the runs of ``study`` score, by seed; nothing is started.

    ``tokens_sha256`` of a seed is that of the records of its runs. Tokens from ``min_context`` on
    are scored.

    Raises:
        UsageError: a setting, model or text is wrong; or points of the study read other windows.

    """
    # Windows depend on no device, so what only CUDA measures is exported anywhere.
    points = comparisons(study, Path(), "cuda")
    runs = {run.seed: run for point in points for run in point.runs if run.kind == "perplexity"}
    kinds = {_read_by(run) for point in points for run in point.runs if run.kind == "perplexity"}
    if not runs:
        raise UsageError(
            "--export-windows exports the windows that perplexity is measured on, and the study "
            "measures none; add --perplexity"
        )
    if len(kinds) > 1:
        raise UsageError(
            "--export-windows takes one kind of windows, but the study varies the text, the model "
            "or the length of its windows; export one point at a time"
        )
    texts = Texts(list(runs.values()))
    first = next(iter(runs.values()))
    assert isinstance(first.measurement, Perplexity)
    text = asdict(first.measurement.text)
    del text["dataset_path"]
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "windows",
        "model": first.resource.model,
        "model_fingerprint": first.resource.model_fingerprint,
        "text": text,
        "context_length": first.resource.context_length,
        "min_context": first.measurement.min_context,
        "runs": [_windows_of(run, texts) for run in runs.values()],
    }


def _windows_of(run: OfflineRun, texts: Texts) -> dict[str, Any]:
    windows = texts.windows(run)
    return {
        "seed": run.seed,
        "tokens_sha256": tokens_sha256(tokens for _, tokens in windows),
        "windows": [{"start": start, "tokens": tokens} for start, tokens in windows],
    }


def _read_by(run: OfflineRun) -> tuple[Any, ...]:
    assert isinstance(run.measurement, Perplexity)
    engine = run.resource
    return engine.model_fingerprint, engine.model, engine.context_length, run.measurement
