"""What all windows, or samples, of a record have in common is stored once. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

WINDOWS, SAMPLES = "windows", "samples"
_EVICTION = "eviction"
_MISSING = object()
_OF_THE_RUN = ("decision_seconds",)
"""Told for the whole run; of a single request they say nothing."""


def stored_once(entries: Sequence[Mapping[str, Any]], name: str = WINDOWS) -> dict[str, Any]:
    """``entries`` under ``name``, and each field that is the same in all, also of their
    ``eviction``, under ``every_window`` (``every_sample``).

    A record is half as large so, and can be committed.
    """
    evictions = [
        {k: v for k, v in entry[_EVICTION].items() if k not in _OF_THE_RUN} for entry in entries
    ]
    plain = [{k: v for k, v in entry.items() if k != _EVICTION} for entry in entries]
    shared, shared_eviction = _common(plain), _common(evictions)
    own = [
        {**_without(entry, shared), _EVICTION: _without(eviction, shared_eviction)}
        for entry, eviction in zip(plain, evictions, strict=True)
    ]
    return {_every(name): {**shared, _EVICTION: shared_eviction}, name: own}


def in_each(record: dict[str, Any]) -> dict[str, Any]:
    """The reverse of ``stored_once`` for a whole record; one that stores all in each, as it is."""
    made = dict(record)
    for name in (WINDOWS, SAMPLES):
        if _every(name) in record:
            shared = made.pop(_every(name))
            made[name] = [
                {**shared, **entry, _EVICTION: {**shared[_EVICTION], **entry[_EVICTION]}}
                for entry in record[name]
            ]
    return made


def _common(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if len(entries) < 2:
        return {}
    return {
        key: value
        for key, value in entries[0].items()
        # 1 and True and 1.0 are equal, and are not the same.
        if all(repr(other.get(key, _MISSING)) == repr(value) for other in entries)
    }


def _without(entry: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in entry.items() if k not in shared}


def _every(name: str) -> str:
    return f"every_{name.removesuffix('s')}"
