"""Records that were written under former names. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_plugins.config import RENAMED

from .specifications import level


def eviction_of(specification: Mapping[str, Any]) -> dict[str, Any]:
    """The eviction settings of a run's engine, under today's names.

    Args:
        specification: of a record, of any age.

    """
    settings = specification["engine"]["eviction"]
    return {RENAMED.get(name, name): value for name, value in settings.items()}


def in_todays_names(record: dict[str, Any]) -> dict[str, Any]:
    """A record under the names of today: committed ones are older than some of them.

    Its key follows from its specification, and mebibytes were called ``_mb`` once.
    """
    named = {
        f"{name.removesuffix('_mb')}_mib" if name.endswith("_mb") else name: value
        for name, value in record.items()
    }
    budget = record["specification"].get("budget_tokens")
    return {**named, "key": f"{record['method']}_{level(record['sparsity'], budget)}"}
