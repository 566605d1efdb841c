"""How a policy spends its budget where every KV head keeps its own tokens.

A rule says which share of the budget is kept by position, in whole blocks, and by what the rest is
ranked. Ranking functions take arrays ``[requests, layers, heads, tokens]`` and give one of the same
shape, higher = keep. The arrays are torch's in the engine. A test may give NumPy's: the functions
here use what both have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

TOKENS = "tokens"
"""Every token rule's need: the position of the token in each slot."""
TOKEN_MASS = "token_mass"
"""Attention mass each token received from its KV head's queries."""
TOKEN_PEAK = "token_peak"
"""The largest probability that any query ever gave a token."""
TOKEN_NEEDS = frozenset({TOKENS, TOKEN_MASS, TOKEN_PEAK})

SELECTIONS = ("head", "layer", "group")
"""Who keeps one set: a KV head, all heads of a layer, or all layers of a layer group."""
LONGEST_WINDOW = 1 << 20
"""Queries; more than any chunk has."""


class Candidates(Protocol):
    """Tokens between which a rule chooses; arrays ``[requests, layers, heads, tokens]``.

    Attributes:
        positions: int, a token's place in the sequence. What lies where differs by head.
        score: float, the attention mass received, as the setting ``score`` has it: ``sum``,
            ``mean`` over the queries that saw the token, or ``decay``; heads of a query group
            are summed. Needs ``TOKEN_MASS``.
        mass: float, the mass itself. Needs ``TOKEN_MASS``.
        peak: float in 0 to 1. Needs ``TOKEN_PEAK``.
        chance: float in 0 to 1, fixed for a (request, layer, head, position).
        key_norm: float, norm of the value over norm of the key.
        value_norm: float, L1 norm of the value.
        key_difference: float in -1 to 1, how little a key looks like the mean of its head's keys:
            minus the cosine of the two.

    """

    @property
    def positions(self) -> Any: ...
    @property
    def score(self) -> Any: ...
    @property
    def mass(self) -> Any: ...
    @property
    def peak(self) -> Any: ...
    @property
    def chance(self) -> Any: ...
    @property
    def key_norm(self) -> Any: ...
    @property
    def value_norm(self) -> Any: ...
    @property
    def key_difference(self) -> Any: ...

    def pooled(self, values: Any, width: int) -> Any:
        """Of ``values``, the mean over the ``width`` (odd) candidates nearest in the sequence."""
        ...


Ranking = Callable[[Candidates, Any], Any]
"""``(candidates, left) -> ranks``, arrays of one shape, higher = keep. ``left``: bool, the tokens
that no earlier ranking has taken."""


@dataclass(frozen=True)
class TokenRule:
    """What of a budget is kept by position, and what ranks the rest.

    Attributes:
        recent: share of the budget that goes to the most recent whole blocks, at least one.
        ranked: (ranking, share of the budget), in order. A later entry gets its share, the first
            one all that is left of the budget; what the first has taken, later ones do not see.
            Sinks come out of the first one's part.
        needs: of ``TOKEN_NEEDS``, what is gathered for the rankings. Those of this module bring
            theirs along.
        selection: who keeps one set of tokens, of ``SELECTIONS``; of a rank's own heads.
        window: None, and ``mass`` is what all queries gave; or it is what the last so many gave. A
            step of at least so many queries then starts it afresh, one of fewer adds to it. It
            takes the place of the setting ``score_queries``.

    Raises:
        ValueError: a share, need, selection or window that is none.

    """

    recent: float
    ranked: tuple[tuple[Ranking, float], ...]
    needs: frozenset[str] = field(default_factory=frozenset)
    selection: str = "head"
    window: int | None = None

    def __post_init__(self) -> None:
        shares = [self.recent, *(share for _, share in self.ranked)]
        if not self.ranked or not all(0.0 <= share <= 1.0 for share in shares):
            raise ValueError("a token rule needs a ranking, and shares from 0 to 1")
        if self.selection not in SELECTIONS:
            raise ValueError(f"selection is {self.selection!r}; use {', '.join(SELECTIONS)}")
        if self.window is not None and not 1 <= self.window <= LONGEST_WINDOW:
            raise ValueError(f"window is {self.window}; use 1 to {LONGEST_WINDOW:,}")
        own = {
            need for ranking, _ in self.ranked for known, need in _OF_RANKINGS if known is ranking
        }
        needs = self.needs | own
        if TOKEN_PEAK in needs:
            needs |= {TOKEN_MASS}  # gathered in the same pass
        if unknown := needs - TOKEN_NEEDS:
            raise ValueError(f"unknown needs {sorted(unknown)}; known: {sorted(TOKEN_NEEDS)}")
        object.__setattr__(self, "needs", frozenset(needs))

    def num_recent(self, keep: int) -> int:
        """Blocks of ``keep`` that are kept by position; one is left for the ranked tokens."""
        return min(max(1, round(keep * self.recent)), keep - 1)


def by_score(tokens: Candidates, left: Any) -> Any:
    """Attention mass, as the setting ``score`` has it."""
    return tokens.score


def by_mass(tokens: Candidates, left: Any) -> Any:
    """All attention a token ever received: what many contexts used over a long life."""
    return tokens.mass


def by_valued_score(tokens: Candidates, left: Any) -> Any:
    """Score times the norm of the value (Guo et al., EMNLP 2024, arXiv:2406.12335, "VATP"): what a
    token added to the outputs, not only how much it was looked at."""
    return tokens.score * tokens.value_norm


def by_peak(tokens: Candidates, left: Any) -> Any:
    """What some query once needed most."""
    return tokens.peak


def by_position(tokens: Candidates, left: Any) -> Any:
    """The most recent."""
    return tokens.positions


def by_chance(tokens: Candidates, left: Any) -> Any:
    """A number drawn once for every token, so that survivors are not drawn again."""
    return tokens.chance


def by_key_norm(tokens: Candidates, left: Any) -> Any:
    """Norm of the value over norm of the key."""
    return tokens.key_norm


def by_key_difference(tokens: Candidates, left: Any) -> Any:
    """Keys unlike the mean key."""
    return tokens.key_difference


def scoring(value_weighted: bool) -> Ranking:
    """The ranking by ``score``, with or without the values' norms."""
    return by_valued_score if value_weighted else by_score


_OF_RANKINGS: tuple[tuple[Ranking, str], ...] = (
    (by_score, TOKEN_MASS),
    (by_valued_score, TOKEN_MASS),
    (by_mass, TOKEN_MASS),
    (by_peak, TOKEN_PEAK),
)
