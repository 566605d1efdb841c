"""What all windows, or samples, of a record have in common is stored once. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

WINDOWS, SAMPLES = "windows", "samples"
_SECONDS = "decision_seconds"


def stored_once(entries: Sequence[Mapping[str, Any]], name: str = WINDOWS) -> dict[str, Any]:
    """``entries`` under ``name``, and each field of their ``eviction`` that is the same in all.

    The latter is under ``every_window`` (``every_sample``). Seconds are told to the microsecond. A
    record is a third smaller so, and can be committed.
    """
    evictions = [_rounded(entry["eviction"]) for entry in entries]
    common = {
        key: value
        for key, value in evictions[0].items()
        if all(key in other and other[key] == value for other in evictions)
    }
    own = [
        {**entry, "eviction": {k: v for k, v in eviction.items() if k not in common}}
        for entry, eviction in zip(entries, evictions, strict=True)
    ]
    return {_every(name): {"eviction": common}, name: own}


def in_each(record: dict[str, Any]) -> dict[str, Any]:
    """The reverse of ``stored_once`` for a whole record; one that stores all in each, as it is."""
    made = dict(record)
    for name in (WINDOWS, SAMPLES):
        if _every(name) in record:
            common = made.pop(_every(name))["eviction"]
            made[name] = [{**e, "eviction": {**common, **e["eviction"]}} for e in record[name]]
    return made


def _every(name: str) -> str:
    return f"every_{name.removesuffix('s')}"


def _rounded(eviction: Mapping[str, Any]) -> dict[str, Any]:
    rounded = {_SECONDS: round(eviction[_SECONDS], 6)} if _SECONDS in eviction else {}
    return {**eviction, **rounded}
