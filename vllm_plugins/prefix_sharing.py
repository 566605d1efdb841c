"""Scheduler side of prefix caching: which blocks may be shared, and what sharing asks of workers.

    computed ........ first eviction ........            a request's tokens
    | exact: hashed, shared | see an evicted cache: never |

A block whose tokens saw the whole cache before them is what any other request would compute, so
it gets a hash and is shared as in stock vLLM. What comes after the first eviction is the request's.

Scores lie with physical blocks. So a request that gathers attention holds every block alone: it
takes blocks from the cache that nobody holds, and copies of those that somebody does. Others share.
No vLLM is imported here.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

_ALL = sys.maxsize


@dataclass
class Takeover:
    """What the workers do for one request before a step.

    Attributes:
        copies: layer group, block, and the block that becomes its like, before it is packed.
        adopted: blocks that come from the cache, and their places in the sequence.
        starts_afresh: nobody else's scores lie with the adopted blocks, and theirs start at zero.
        replaced: ``{group: {position: block}}``, entries of the block table that change.

    """

    copies: list[tuple[int, int, int]] = field(default_factory=list)
    adopted: list[tuple[int, int]] = field(default_factory=list)
    starts_afresh: bool = False
    replaced: dict[int, dict[int, int]] = field(default_factory=dict)


class PrefixSharing:
    """What the layer groups' managers know together of blocks that are shared."""

    def __init__(self) -> None:
        self._exact: dict[str, int] = {}
        self._expected: dict[str, tuple[Hashable, ...]] = {}
        self._awaited: Counter[Hashable] = Counter()

    def num_exact(self, request_id: str) -> int:
        """The first tokens of a request that any other request could have computed."""
        return self._exact.get(request_id, _ALL)

    def first_eviction(self, request_id: str, num_tokens: int) -> None:
        """Tokens from ``num_tokens`` on see an evicted cache. Later evictions change nothing."""
        self._exact.setdefault(request_id, num_tokens)
        self.expect(request_id, ())

    def expect(self, request_id: str, hashes: Sequence[Hashable]) -> None:
        """Blocks with these hashes are being computed; they can be shared a step later."""
        for known in self._expected.pop(request_id, ()):
            self._awaited[known] -= 1
            if not self._awaited[known]:
                del self._awaited[known]
        if hashes:
            self._expected[request_id] = tuple(hashes)
            self._awaited.update(self._expected[request_id])

    def is_expected(self, block_hash: Hashable) -> bool:
        """Whether somebody computes this block just now: to wait a step saves computing it too."""
        return block_hash in self._awaited

    def forget(self, request_id: str) -> None:
        """The request lost its blocks: it ended, or was preempted and will start again."""
        self._exact.pop(request_id, None)
        self.expect(request_id, ())
