"""How long work takes on the GPU: CUDA events, L2 emptied before each run, the median."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

_FLUSHED = 2**30
"""Bytes written before a run: more than any L2, and so long that the host is ahead of the GPU."""


def median_ms(function: Callable[[], Any]) -> float:
    """Of a function that may be run any number of times."""
    return median_ms_prepared(function, lambda: None, repeats=60)


def median_ms_prepared(
    function: Callable[[], Any], prepare: Callable[[], Any], repeats: int = 30, warmup: int = 5
) -> float:
    """Of a function that changes what it works on; ``prepare`` puts that back, untimed."""
    import torch

    flushed = torch.empty(_FLUSHED, dtype=torch.int8, device="cuda")
    events = []
    for _ in range(warmup + repeats):
        prepare()
        flushed.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events[warmup:])


def copy_bandwidth() -> float:
    """Device-to-device copy, bytes read plus bytes written per second."""
    import torch

    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (median_ms(lambda: target.copy_(source)) / 1e3)
