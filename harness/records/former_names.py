"""Settings in records that were written under their former names. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_plugins.config import RENAMED


def eviction_of(specification: Mapping[str, Any]) -> dict[str, Any]:
    """The eviction settings of a run's engine, under today's names.

    Args:
        specification: of a record, of any age.

    """
    settings = specification["engine"]["eviction"]
    return {RENAMED.get(name, name): value for name, value in settings.items()}
