"""What figures draw beside the aggregated results: curves over positions and steps, the Pareto
front. Pure: records in, plain numbers out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..records.specifications import DENSE
from .aggregate import independent, window_losses
from .perplexity import counts
from .statistics import mean_interval


def curves(records: Sequence[dict[str, Any]], results: dict[str, Any]) -> dict[str, Any]:
    """Everything of ``curves.json``.

    - ``nll_by_position``: key to ``queries`` (first query of each sum), mean ``nll`` (nats per
      token) and, beside dense, ``difference`` from dense on the same windows with a 95% interval
      (``low``, ``high``; both over windows that share no token, see ``aggregate.independent``);
    - ``cache``: key to ``tokens`` processed and ``blocks`` held per window, of the first run;
    - ``pareto``: keys that no other key beats in both peak KV memory and perplexity.
    """
    grouped: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        grouped.setdefault(record["key"], []).append(record)
    dense = next((runs for runs in grouped.values() if runs[0]["method"] == DENSE), None)
    return {
        "nll_by_position": {key: _by_position(runs, dense) for key, runs in grouped.items()},
        "cache": {
            key: runs[0]["cache_trace"]
            for key, runs in grouped.items()
            if runs[0].get("cache_trace", {}).get("tokens")
        },
        "pareto": pareto(
            {
                key: (entry["peak_memory_mib"]["mean"], entry["perplexity"]["mean"])
                for key, entry in results.items()
            }
        ),
    }


def pareto(points: dict[str, tuple[float, float]]) -> list[str]:
    """Keys whose pair no other pair beats: not worse in both, better in one (less is better)."""
    return [
        key
        for key, (x, y) in points.items()
        if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points.values())
    ]


def _by_position(
    runs: list[dict[str, Any]], dense: list[dict[str, Any]] | None
) -> dict[str, list[float]]:
    windows = window_losses(runs)
    base = window_losses(dense) if dense is not None and dense is not runs else {}
    chunk = runs[0]["windows"][0]["predictions_per_entry"]
    size = np.array(counts(runs[0]["windows"][0]))
    scored = np.flatnonzero(size)
    loss = np.array([_nll(window, size) for window in windows.values()])
    curve = {
        "queries": (scored * chunk).tolist(),
        "nll": np.round(loss[:, scored].mean(axis=0), 5).tolist(),
    }
    if base.keys() >= windows.keys():
        length = runs[0]["specification"]["engine"]["context_length"]
        tested = independent(windows, length)
        difference = np.array([_nll(windows[key], size) - _nll(base[key], size) for key in tested])
        means = np.array([mean_interval(difference[:, i]) for i in scored])
        for name, column in zip(("difference", "low", "high"), means.T, strict=True):
            curve[name] = np.round(column, 5).tolist()
    return curve


def _nll(window: dict[str, Any], size: np.ndarray) -> np.ndarray:
    """Mean loss by sum, nats per token; 0 where nothing is scored."""
    sums = np.array(window["log_likelihoods"])
    return -np.divide(sums, size, out=np.zeros(len(sums)), where=size > 0)
