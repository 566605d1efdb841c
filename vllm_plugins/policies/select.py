"""The one selection routine every policy shares."""

from __future__ import annotations

import numpy as np


def top(priority: np.ndarray, count: int) -> np.ndarray:
    """Indices of the ``count`` highest entries of ``priority`` (``[n]``), in ascending order.

    Ties go to the later index (the more recent block), so that equal scores, all zero say,
    degrade to "keep the recent ones" and never depend on the order of a partition.
    """
    n = len(priority)
    if count <= 0:
        return np.empty(0, dtype=np.intp)
    if count >= n:
        return np.arange(n)
    threshold = np.partition(priority, n - count)[n - count]
    chosen = priority >= threshold
    if np.count_nonzero(chosen) == count:
        return np.flatnonzero(chosen)
    chosen = priority > threshold
    missing = count - int(np.count_nonzero(chosen))
    ties = np.flatnonzero(priority == threshold)
    chosen[ties[len(ties) - missing :]] = True
    return np.flatnonzero(chosen)


def num_recent(keep: int, share: float) -> int:
    """Blocks of a recent window that takes ``share`` of the budget ``keep``, at least one."""
    return max(1, round(keep * share))


def middle(
    positions: np.ndarray, keep: int, *, num_sink_blocks: int, num_recent_blocks: int
) -> tuple[int, int]:
    """The half-open range of indices open to choice: behind the sinks, before the window.

        | sinks | ............ middle ............ | recent window |
        0       start                              stop            n

    The window shrinks where sinks and window together exceed ``keep``.
    """
    start = int(np.searchsorted(positions, num_sink_blocks))
    stop = len(positions) - min(num_recent_blocks, keep - start)
    return start, max(start, stop)


def keep_highest(
    priority: np.ndarray,
    positions: np.ndarray,
    keep: int,
    *,
    num_sink_blocks: int,
    num_recent_blocks: int,
) -> np.ndarray:
    """Sinks, the recent window, and the highest ``priority`` among the rest: ``keep`` in all.

    Args:
        priority: float ``[n]``, higher = keep.
        positions: int ``[n]``, ascending places of the blocks in the sequence.
        keep: how many blocks stay.
        num_sink_blocks: blocks at positions below this are always kept.
        num_recent_blocks: so many of the last blocks are always kept.

    Returns:
        int ``[min(keep, n)]``, ascending indices into ``positions``.

    """
    n = len(positions)
    if priority.shape != positions.shape:
        raise ValueError(f"{priority.shape} priorities for {positions.shape} positions")
    if keep >= n:
        return np.arange(n)
    start, stop = middle(
        positions, keep, num_sink_blocks=num_sink_blocks, num_recent_blocks=num_recent_blocks
    )
    chosen = top(priority[start:stop], keep - start - (n - stop))
    return np.concatenate((np.arange(start), chosen + start, np.arange(stop, n)))
