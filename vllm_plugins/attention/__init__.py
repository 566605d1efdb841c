"""Compaction and scoring around the platform's own attention backend.

The only place that chooses by platform. To add one: its backend (``cpu.py`` is the model), its
worker class, and a line in ``_PLATFORMS``.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config import EvictionConfigError


@dataclass(frozen=True)
class Platform:
    """What differs by device type (``vllm.platforms.current_platform.device_type``)."""

    worker: str
    block_size_multiple: int


_PLATFORMS = {"cpu": Platform("vllm_plugins.worker_cpu.EvictionCPUWorker", 32)}


def _platform() -> Platform:
    from vllm.platforms import current_platform

    try:
        return _PLATFORMS[current_platform.device_type]
    except KeyError:
        raise EvictionConfigError(
            f"eviction does not run on {current_platform.device_type or 'this platform'} yet; "
            f"install the build of vLLM for: {', '.join(_PLATFORMS)}"
        ) from None


def worker_class() -> str:
    """``worker_cls`` of the engine."""
    return _platform().worker


def block_size_multiple() -> int:
    """Block sizes must be a multiple of this many tokens."""
    return _platform().block_size_multiple
