"""Where the time of an engine's steps goes on a CUDA device, by torch's profiler."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from .kernel_classes import busy, time_by_class

NUM_STEPS = 20


def split_of_steps(step: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds per step by class of kernel, over ``NUM_STEPS`` steps.

    ``idle`` is the part of ``ms_per_step`` in which nothing ran on the device. Both are those of
    steps under the profiler, which the host pays for: ``ms_per_step`` of the run's window is the
    figure without it.

    Args:
        step: makes one step.

    """
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        torch.cuda.synchronize()  # what is in flight belongs to the steps before
        started = time.perf_counter()
        for _ in range(NUM_STEPS):
            step()
        torch.cuda.synchronize()
        wall_ms = 1e3 * (time.perf_counter() - started)
    events = [
        (event.name, event.time_range.start / 1e3, event.time_range.end / 1e3)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    total_ms = {
        "ms_per_step": wall_ms,
        **time_by_class(events),
        "idle": max(0.0, wall_ms - busy(events)),
    }
    return {"steps": NUM_STEPS, **{name: ms / NUM_STEPS for name, ms in total_ms.items()}}
