"""Where the time of an engine's steps goes on a CUDA device, by torch's profiler."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from .kernel_classes import busy, time_by_class

NUM_STEPS = 20

_profiler: Any = None
_started = 0.0


def split_of_steps(
    step: Callable[[], Any], in_workers: Callable[..., list[Any]]
) -> dict[str, float]:
    """Milliseconds per step by class of kernel, over ``NUM_STEPS`` steps.

    ``idle`` is the part of ``ms_per_step`` in which nothing ran on the device. Both are those of
    steps under the profiler, which the host pays for: ``ms_per_step`` of the run's window is the
    figure without it. The core may be a step ahead of its outputs, so the device's classes are
    measured as shares of a time, and told as those of the steps seen here.

    Args:
        step: makes one step.
        in_workers: ``LLM.collective_rpc``; the first worker's device is told.

    """
    step()
    in_workers(_begin)
    step()  # what waited for the call
    started = time.perf_counter()
    for _ in range(NUM_STEPS):
        step()
    ms_per_step = 1e3 * (time.perf_counter() - started) / NUM_STEPS
    shares = in_workers(_end)[0]
    return {
        "steps": NUM_STEPS,
        "ms_per_step": ms_per_step,
        **{name: share * ms_per_step for name, share in shares.items()},
    }


def _begin(worker: Any) -> None:
    """In a worker, between two steps."""
    global _profiler, _started
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()  # what is in flight belongs to the steps before
    _profiler = profile(activities=[ProfilerActivity.CUDA])
    _profiler.__enter__()
    _started = time.perf_counter()


def _end(worker: Any) -> dict[str, float]:
    """In a worker: the share of each class, and of ``idle``, in the time since ``_begin``."""
    global _profiler
    import torch
    from torch.autograd import DeviceType

    torch.cuda.synchronize()
    wall_ms = 1e3 * (time.perf_counter() - _started)
    _profiler.__exit__(None, None, None)
    events = [
        (event.name, event.time_range.start / 1e3, event.time_range.end / 1e3)
        for event in _profiler.events()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    _profiler = None
    total_ms = {**time_by_class(events), "idle": max(0.0, wall_ms - busy(events))}
    return {name: ms / wall_ms for name, ms in total_ms.items()}
