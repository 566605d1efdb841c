"""Names that tasks invent: everyday words, so that every tokenizer knows them."""

from __future__ import annotations

import numpy as np

_ADJECTIVES = """
amber ancient bitter bold brave brief bright broad calm careful cheap clever cold crisp curious
daily deep distant eager early empty faint famous fancy fast firm fresh gentle golden grand
happy heavy hidden hollow honest humble icy jolly keen late lazy light lively lonely loud lucky
mellow mighty narrow noble pale patient plain polite proud quick quiet rapid rare rough rusty
secret shallow sharp shiny silent silver simple sleepy smooth soft solid steady stern strange
sturdy sweet swift tall tender tidy tiny warm wild wise wooden young
"""
_NOUNS = """
anchor apple arrow badge banner barrel basket beacon blanket bottle bridge bucket candle canyon
carpet castle cellar chapel circle compass copper cotton cradle crater crystal curtain desert
dragon engine falcon feather fiddle forest fountain garden glacier hammer harbor helmet island
jacket kettle ladder lantern ledger lemon lizard magnet marble meadow mirror mountain needle
ocean orchard orchid oyster paddle palace parcel pebble pencil pepper pillow planet pocket
pumpkin rabbit ribbon river rocket saddle shadow shelter spider square station temple thunder
ticket tiger timber tower tunnel turtle valley velvet violin wagon walnut whistle window
"""
ADJECTIVES, NOUNS = tuple(_ADJECTIVES.split()), tuple(_NOUNS.split())


def names(rng: np.random.Generator, count: int, *more: tuple[str, ...]) -> list[tuple[str, ...]]:
    """``count`` different (adjective, noun, one of each of ``more``)."""
    parts = (ADJECTIVES, NOUNS, *more)
    sizes = tuple(map(len, parts))
    drawn = rng.choice(int(np.prod(sizes)), size=count, replace=False)
    places = np.stack(np.unravel_index(drawn, sizes), axis=1).tolist()
    return [tuple(part[i] for part, i in zip(parts, place, strict=True)) for place in places]


def numbers(rng: np.random.Generator, count: int, digits: int) -> list[str]:
    """``count`` different numbers of so many digits."""
    low = 10 ** (digits - 1)
    found: dict[str, None] = {}
    while len(found) < count:
        drawn = rng.integers(low, 10 * low, size=count - len(found))
        found.update(dict.fromkeys(map(str, drawn.tolist())))
    return list(found)
