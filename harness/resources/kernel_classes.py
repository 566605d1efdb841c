"""What a kernel of the GPU works at, by its name. Pure."""

from __future__ import annotations

from collections.abc import Iterable

CLASSES = ("attention", "scores", "packing", "products", "other")
"""The parts of a step's time on the device."""
_NAMES = (
    # vLLM's writing of keys and values bears FlashAttention's name; FlashAttention's own kernels
    # bear CUTLASS's.
    ("other", ("reshape_and_cache",)),
    ("scores", ("_mass_kernel", "_start_kernel", "_age_kernel", "_key_norm_kernel")),
    ("scores", ("_compact_kernel",)),
    ("packing", ("_choose_kernel", "_key_difference_kernel", "_move_kernel")),
    ("attention", ("flash",)),
    ("products", ("gemm", "gemv", "nvjet", "cutlass", "cublas", "splitk")),
)
"""The first whose fragment a name holds, whatever the case."""

Event = tuple[str, float, float]
"""A kernel's name, its begin and its end, in one unit of time."""


def class_of(name: str) -> str:
    """The class of a kernel, of ``CLASSES``."""
    lower = name.lower()
    return next((c for c, parts in _NAMES if any(part in lower for part in parts)), "other")


def busy(events: Iterable[Event]) -> float:
    """Time in which at least one of ``events`` ran; they may overlap."""
    total, until = 0.0, float("-inf")
    for _, begin, end in sorted(events, key=lambda event: event[1]):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def time_by_class(events: Iterable[Event]) -> dict[str, float]:
    """Time of ``events`` by class; every class is there."""
    times = dict.fromkeys(CLASSES, 0.0)
    for name, begin, end in events:
        times[class_of(name)] += end - begin
    return times
