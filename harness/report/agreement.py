"""Whether two machines agree: the same study, on the same windows, in two folders of records."""

from __future__ import annotations

from typing import Any

from ..analysis.perplexity import mean_perplexity
from ..errors import UsageError
from ..records.former_names import eviction_of
from ..records.specifications import DENSE
from .cells import change, level
from .lines import provenance_line
from .tables import Row, markdown

Records = list[dict[str, Any]]
_OF_ENGINE = ("model", "context_length", "prefill_chunk", "block_size", "protocol")
"""Without the model's fingerprint: versions of Transformers may write its configuration
differently."""
_OF_RUN = ("text", "num_samples", "min_context")


def agreement_table(first: Records, second: Records) -> str:
    """Perplexities of two folders of records side by side, in Markdown, with their machines.

    Perplexity is the mean over runs, as in every other table.

    Raises:
        UsageError: the folders differ in their windows, settings or methods.

    """
    a, b = _by_key(first), _by_key(second)
    _check(a, b)
    table: list[Row] = [
        ("method", "sparsity", _precision(first[0]), _precision(second[0]), "difference")
    ]
    for key, runs in a.items():
        ours, theirs = _perplexity(runs), _perplexity(b[key])
        record = next(iter(runs.values()))
        sparsity = "-" if record["method"] == DENSE else level(key, record)
        row = (record["method"], sparsity, f"{ours:.3f}", f"{theirs:.3f}")
        table.append((*row, change(theirs, ours, 2)))
    runs = next(iter(a.values()))
    windows = sum(len(record["windows"]) for record in runs.values())
    told = (
        f"{_precision(first[0])}: {provenance_line(first[0])} {_precision(second[0])}: "
        f"{provenance_line(second[0])} Mean perplexity of {len(runs)} run(s) over "
        f"the same {windows} windows."
    )
    return f"{told}\n\n{markdown(table)}"


def _check(a: dict[str, dict[int, Any]], b: dict[str, dict[int, Any]]) -> None:
    if a.keys() != b.keys():
        raise UsageError(
            f"the two folders hold different methods or sparsities: "
            f"{', '.join(sorted(a.keys() ^ b.keys()))} only in one"
        )
    for key in a:
        if a[key].keys() != b[key].keys():
            raise UsageError(f"the two folders hold {key} of different seeds")
        for seed, record in a[key].items():
            ours, theirs = _conditions(record), _conditions(b[key][seed])
            shared = ours.keys() & theirs.keys()  # a newer version may have settings more
            if differing := sorted(name for name in shared if ours[name] != theirs[name]):
                raise UsageError(
                    f"{key} of seed {seed} differs between the two folders in "
                    f"{' and '.join(differing)}; they must be of the same study"
                )


def _conditions(record: dict[str, Any]) -> dict[str, Any]:
    """What must be the same on both sides: everything but machine, precision and engine size."""
    run = record["specification"]
    return {
        **{name: run["engine"].get(name) for name in _OF_ENGINE},
        **{name: run.get(name) for name in _OF_RUN},
        **eviction_of(run),
        "method": run["method"],
        "starts of windows": [window["start"] for window in record["windows"]],
    }


def _by_key(records: Records) -> dict[str, dict[int, dict[str, Any]]]:
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for record in records:
        found.setdefault(record["key"], {})[record["seed"]] = record
    return found


def _perplexity(runs: dict[int, dict[str, Any]]) -> float:
    return mean_perplexity(runs.values())


def _precision(record: dict[str, Any]) -> str:
    return f"{record['hardware']['device'].upper()} {record['engine']['dtype']}"
