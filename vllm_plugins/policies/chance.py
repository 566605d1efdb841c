"""A number for every (request, place), drawn once. The same formula for NumPy and torch arrays."""

from __future__ import annotations

from typing import Any

_MULTIPLIER = 0x2545F491
_MASK = 0x7FFFFFFF


def chance(positions: Any, seed: int, stream: Any = 0) -> Any:
    """Numbers from 0 to 1, the same whenever and wherever they are asked for.

    A hash, not a generator: which tokens are left, and in what order they lie, changes nothing.
    Integers of both libraries agree; torch then rounds to float32.

    Args:
        positions: int64 array, at least 0.
        seed: of the request.
        stream: int64 array that broadcasts with ``positions``: numbers of different streams (layer
            and head) have nothing to do with each other.

    """
    own = (seed * 0x85EBCA6B) & _MASK
    x = ((positions + 1) * 0x9E3779B1 + (stream + 1) * 0xC2B2AE35 + own) & _MASK
    for shift in (15, 13, 16):
        x = ((x ^ (x >> shift)) * _MULTIPLIER) & _MASK
    return (x ^ (x >> 15)) / (_MASK + 1)
