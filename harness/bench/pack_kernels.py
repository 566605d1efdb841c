"""Packing: what chooses every head's tokens, the launch that moves them, and both.

Scores are drawn at random, so nearly all of what leaves the recent window of a decode is chosen
and moves: more than in most texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .shapes import ELEMENT_BYTES, SHAPES

POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "h2o": ("h2o", {}),
    "cab": ("cab", {}),
    "cab, bridges by peaks": ("cab", {"bridge_definition": "peak"}),
    "keydiff": ("keydiff", {}),
}
"""A policy and its parameters: they rank by mass, by mass and keys, by mass and the largest
probability, by keys."""
Timer = Callable[[Callable[[], Any], Callable[[], Any]], float]
"""``(function, prepare) -> milliseconds`` (``device_time.median_ms_prepared``)."""


@dataclass(frozen=True)
class Packs:
    """Requests that are packed together, all alike.

    Attributes:
        requests: number of them.
        region: tokens that every head keeps of the candidates.
        leaving: further candidates, tokens: those whose blocks are freed.
        budget: tokens that a request may hold in all.
        processed: tokens of a request's sequence.
        held: tokens that lie in the pool, those of neighbours among them.

    """

    requests: int
    region: int
    leaving: int
    budget: int
    processed: int
    held: int


PACKS = {
    "decode, 8 of 96 x (27 + 2) blocks": Packs(8, 432, 32, 544, 5440, 96 * 592),
    "2 x 4000 to a tenth": Packs(2, 320, 3600, 400, 4000, 2 * 4000),
    "16000 to a tenth": Packs(1, 1280, 14400, 1600, 16000, 16000),
}
"""In blocks of 16; a fifth of the budget is the recent window, no candidates."""


class PackCase:
    """Caches and scores of all layers, and requests to pack."""

    def __init__(
        self,
        shape: dict[str, int],
        packs: Packs,
        policy: str,
        block_size: int,
        device: str = "cuda",
    ) -> None:
        import torch

        from vllm_plugins.attention.packing_cuda import CUDAPacker
        from vllm_plugins.attention.token_choice import Batch
        from vllm_plugins.attention.token_scores import TokenScores
        from vllm_plugins.packs import Pack
        from vllm_plugins.policies import TOKEN_MASS, TOKEN_PEAK, TOKENS, get_policy

        torch.manual_seed(0)
        self.packs, self.policy, self.block_size = packs, policy, block_size
        self.layers, self.kv_heads = shape["layers"], shape["kv_heads"]
        self.head_size = shape["head_size"]
        region, budget = (-(-n // block_size) for n in (packs.region, packs.budget))
        candidates = region + -(-packs.leaving // block_size)
        num_blocks = 1 + max(-(-packs.held // block_size), packs.requests * candidates)
        cache_shape = (num_blocks, self.kv_heads, block_size)
        caches = {
            str(layer): torch.randn(
                *cache_shape, 2 * self.head_size, device=device, dtype=torch.bfloat16
            )
            for layer in range(self.layers)
        }
        needs = frozenset({TOKENS, TOKEN_MASS, TOKEN_PEAK})
        self.scores = TokenScores(self.layers, cache_shape, needs, torch.device(device))
        ids = torch.randperm(num_blocks - 1)[: packs.requests * candidates] + 1
        self.packer = CUDAPacker(
            kv_caches=caches,
            groups=[list(caches)],
            tokens=self.scores,
            scoring="mean",
            sink_tokens=4,
        )
        base, parameters = POLICIES[policy]
        known = get_policy(base)
        arguments = known.resolve(parameters)
        assert known.tokens is not None
        rule = known.tokens(arguments)
        self.batch = Batch.of(
            [
                Pack(0, own.tolist(), region, budget, packs.processed, 0, base, arguments)
                for own in ids.view(packs.requests, candidates)
            ],
            rule,
            block_size,
            4,
            torch.device(device),
        )
        self.rankings = self.packer.rankings(rule)
        self._fill(ids.to(device), candidates)
        self._before = {name: array.clone() for name, array in self.scores.arrays().items()}

    def _fill(self, ids: Any, candidates: int) -> None:
        """Positions that ascend, scores at random, whatever the token's age."""
        import torch

        n = candidates * self.block_size
        place = torch.arange(n, device=ids.device)
        position = (place * max(self.packs.processed, n) // n).view(candidates, 1, -1)
        position = position.repeat(self.packs.requests, self.kv_heads, 1)
        self.scores.position[:, ids] = position.int()
        age = (self.packs.processed - position).clamp(min=1)
        self.scores.mass[:, ids] = age * torch.rand(self.layers, *position.shape, device=ids.device)
        self.scores.peak[:, ids] = torch.rand(self.layers, *position.shape, device=ids.device)

    def restore(self) -> None:
        """Scores as they were: tokens that were chosen are to be chosen, and moved, again."""
        for name, array in self.scores.arrays().items():
            array.copy_(self._before[name])

    def choose(self) -> Any:
        """What chooses, in all layers and requests: source, target, count."""
        return self.packer.chosen(self.rankings, self.batch, 0, slice(0, self.layers))

    def move(self, moves: Any) -> None:
        """The launch that moves."""
        self.packer.move(0, slice(0, self.layers), self.batch.block_ids, *moves)

    def entry(self, timer: Timer, bandwidth: float) -> dict[str, Any]:
        """Times and bytes.

        Of choosing, the bytes of the scores and keys that its rankings ask for, read once; what one
        launch leaves for the next, ranks of keys and lists of moves, is not counted. Of moving,
        keys, values and scores, read and written.
        """
        from vllm_plugins.kernels import choose

        moves = self.choose()
        num_moves = int(moves[2].sum())
        candidates = self.packs.requests * self.batch.most_candidates
        key_bytes = self.head_size * ELEMENT_BYTES
        read = 4 + sum(key_bytes if kind == choose.GIVEN else 4 for kind in self.rankings)
        token_bytes = 2 * self.head_size * ELEMENT_BYTES + 12
        num_bytes = {
            "choose": candidates * self.layers * self.kv_heads * read,
            "move": 2 * num_moves * token_bytes,
        }
        num_bytes["both"] = sum(num_bytes.values())
        parts = {
            "choose": self.choose,
            "move": lambda: self.move(moves),
            "both": lambda: self.move(self.choose()),
        }
        entry = {
            "policy": self.policy,
            "block_size": self.block_size,
            "layers": self.layers,
            "requests": self.packs.requests,
            "candidate_tokens": self.batch.most_candidates,
            "moves": num_moves,
        }
        for part, function in parts.items():
            ms = timer(function, self.restore)
            entry[f"{part}_ms"] = ms
            entry[f"{part}_bytes"] = num_bytes[part]
            entry[f"{part}_share_of_copy_bandwidth"] = num_bytes[part] / (ms / 1e3) / bandwidth
        return entry


def measure_packing(
    shape: str, block_size: int, bandwidth: float, timer: Timer
) -> Iterator[dict[str, Any]]:
    """Entries of all packs and policies.

    Args:
        shape: of ``SHAPES``.
        block_size: tokens.
        bandwidth: of a copy, bytes per second.
        timer: gives milliseconds.

    """
    for name, packs in PACKS.items():
        for policy in POLICIES:
            case = PackCase(SHAPES[shape], packs, policy, block_size)
            entry = {"shape": shape, "packs": name, **case.entry(timer, bandwidth)}
            del case  # before the next one takes as much
            print(told(entry), flush=True)
            yield entry


def told(entry: dict[str, Any]) -> str:
    """A line for the terminal."""
    parts = (
        f"{part} {entry[f'{part}_ms'] * 1e3:7.1f} us {entry[f'{part}_bytes'] / 2**20:6.1f} MiB "
        f"{100 * entry[f'{part}_share_of_copy_bandwidth']:5.1f}%"
        for part in ("choose", "move", "both")
    )
    return f"{entry['shape']:13} {entry['packs']:34} {entry['policy']:20} {'  '.join(parts)}"
