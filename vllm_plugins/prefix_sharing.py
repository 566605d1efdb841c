"""Scheduler side of prefix caching: which blocks may be shared, and what sharing asks of workers.

    computed ........ first eviction ........            a request's tokens
    | exact: hashed, shared | see an evicted cache: never |

A block whose tokens saw the whole cache before them is what any other request would compute, so
it gets a hash and is shared as in stock vLLM. What comes after the first eviction is the request's.

Scores lie with physical blocks. So a request that gathers attention holds every block alone: it
takes blocks from the cache that nobody holds, and copies of those that somebody does. Of its prompt
the last ``OWN_QUERIES`` tokens are always computed. Others share, and all but their last token.
No vLLM is imported here.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

OWN_QUERIES = 32
"""As SnapKV's window, which prompts' last queries rank a prompt's tokens by."""
_ALL = sys.maxsize
Copy = tuple[int, int, int]
"""Layer group, block, and the block that becomes its like."""


def always_computed(gathers_attention: bool) -> int:
    """So many tokens of a prompt's end are computed, whatever the cache holds."""
    return OWN_QUERIES if gathers_attention else 1


class Unscored(list[Any]):
    """Block hashes of a request that gathers no attention.

    vLLM looks prefixes up by a class method, to which the hashes are all there is of a request
    (``EvictableManager.find_longest_cache_hit``).
    """


@dataclass
class Takeover:
    """What the workers do for one request before a step.

    Attributes:
        copies: in the order they were planned; those of a region come before its pack.
        adopted: blocks that come from the cache, and their places in the sequence.
        starts_afresh: nobody else's scores lie with the adopted blocks, and theirs start at zero.
        replaced: ``{group: {position: block}}``, entries of the block table that change.

    """

    copies: list[Copy] = field(default_factory=list)
    adopted: list[tuple[int, int]] = field(default_factory=list)
    starts_afresh: bool = False
    replaced: dict[int, dict[int, int]] = field(default_factory=dict)


class PrefixSharing:
    """What the layer groups' managers know together of blocks that are shared."""

    def __init__(self) -> None:
        self._exact: dict[str, int] = {}
        self._expected: set[Hashable] = set()
        self._step = -1

    def num_exact(self, request_id: str) -> int:
        """The first tokens of a request that any other request could have computed."""
        return self._exact.get(request_id, _ALL)

    def first_eviction(self, request_id: str, num_tokens: int) -> None:
        """Tokens from ``num_tokens`` on see an evicted cache. Later evictions change nothing."""
        self._exact.setdefault(request_id, num_tokens)

    def forget(self, request_id: str) -> None:
        """The request lost its blocks: it ended, or was preempted and will start again."""
        self._exact.pop(request_id, None)

    def expect(self, hashes: Iterable[Hashable], step: int) -> None:
        """Blocks with these hashes are computed in the step that is scheduled after ``step``.

        They can be shared in the next one, where whoever computes them comes first again. If nobody
        goes on, nobody waits: an expectation ends with its step.
        """
        if step != self._step:
            self._expected, self._step = set(), step
        self._expected.update(hashes)

    def is_expected(self, block_hash: Hashable, step: int) -> bool:
        """Whether to wait a step for a block, which saves computing it too."""
        return step == self._step and block_hash in self._expected
