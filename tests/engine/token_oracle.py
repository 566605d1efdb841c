"""Eviction of single tokens by every head for itself, in plain PyTorch over a Transformers model.

Written from the definitions, not from the plugin: a cache per layer and KV head from which evicted
tokens are deleted, and attention probabilities as Transformers reports them, one query at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache

from .windowed import full_layers, pass_windows


@dataclass
class Token:
    """What a head knows of a token it holds."""

    position: int
    mass: float = 0.0
    peak: float = 0.0
    late: float = 0.0
    """Mass from the last queries of the last chunk that had as many, and from later ones."""
    key: torch.Tensor | None = None
    value: torch.Tensor | None = None


@dataclass
class Result:
    """Log-probs of tokens 1, 2, ..., and of the last decision who stays of the candidates:
    positions by layer and head. Layers with a window hold what it shows, and take no part."""

    log_likelihoods: list[float] = field(default_factory=list)
    num_decisions: int = 0
    kept: list[list[list[int]]] = field(default_factory=list)


Choose = Callable[[list[list[list[Token]]], int, int, int], list[list[set[int]]]]
"""``(candidates by layer and head, tokens processed, room, budget) -> positions that stay``."""


@torch.no_grad()
def run(
    model,
    tokens: list[int],
    *,
    keep: int,
    chunk: int,
    block_size: int,
    recent: float,
    slack: int,
    choose: Choose,
    prompt: int | None = None,
    every: int = 1,
    every_of_prompt: int = 1,
    in_full: int = 0,
    half_life: float | None = None,
    window: int = 1,
    decisions: Mapping[int, int] | None = None,
) -> Result:
    """Tokens come in chunks, from ``prompt`` on one by one; of these every ``every``-th is scored
    and counts for all; ``every_of_prompt`` is the like for longer chunks but the ``in_full`` last
    queries of each. ``keep`` and ``slack`` are blocks. ``window``: queries of ``Token.late``.

    ``decisions``: where to decide other than before each chunk and with all tokens before it:
    first token of a chunk to the number of tokens whose full blocks count then.
    """
    model.set_attn_implementation("eager")
    config = model.config
    layers, heads = full_layers(config), config.num_key_value_heads
    cache = DynamicCache()
    alive = [[[] for _ in range(heads)] for _ in layers]
    result = Result()
    n = len(tokens)
    decay = 1.0 if half_life is None else 0.5 ** (1.0 / half_life)
    num_recent = min(max(1, round(recent * keep)), keep - 1)
    packed = first_unpacked = 0  # blocks of the region; first block of the sequence behind it

    prompt = n if prompt is None else prompt
    starts = [*range(0, prompt, chunk), *range(prompt, n)]
    for start, stop in zip(starts, [*starts[1:], n], strict=True):
        full = (start if decisions is None else decisions.get(start, 0)) // block_size
        if packed + full - first_unpacked > keep + slack:
            packed, first_unpacked = keep - num_recent, full - num_recent
            limit = first_unpacked * block_size
            candidates = [
                [[t for t in held if t.position < limit] for held in layer] for layer in alive
            ]
            stay = choose(candidates, start, packed * block_size, keep * block_size)
            result.num_decisions += 1
            result.kept = [[sorted(kept) for kept in layer] for layer in stay]
            for place, layer in enumerate(layers):
                keys, values = cache.layers[layer].keys, cache.layers[layer].values
                rows = []
                for head in range(heads):
                    held = alive[place][head]
                    rows.append(
                        [
                            i
                            for i, t in enumerate(held)
                            if t.position >= limit or t.position in stay[place][head]
                        ]
                    )
                    alive[place][head] = [held[i] for i in rows[-1]]
                index = torch.tensor(rows)[None, :, :, None].expand(-1, -1, -1, keys.shape[-1])
                cache.layers[layer].keys = keys.gather(2, index)
                cache.layers[layer].values = values.gather(2, index)
        for t in range(start, stop):
            pass_windows(cache, config)
            output = model(
                input_ids=torch.tensor([[tokens[t]]]),
                position_ids=torch.tensor([[t]]),
                attention_mask=torch.zeros(1, 1, 1, 1),  # nothing in the cache is hidden
                past_key_values=cache,
                use_cache=True,
                output_attentions=True,
            )
            single = stop - start == 1
            weight = every if single else 1 if t >= stop - in_full else every_of_prompt
            scored = t % weight == 0
            begins = stop - start >= window and t == stop - window
            # A request's own window is scored in full.
            late = t >= stop - window if stop - start >= window else scored or not single
            late_weight = every if single else 1
            for place, layer in enumerate(layers):
                grouped = output.attentions[layer][0, :, 0].double().unflatten(0, (heads, -1))
                for head in range(heads):
                    held = alive[place][head]
                    states = cache.layers[layer]
                    held.append(Token(t))
                    held[-1].key = states.keys[0, head, -1].double()
                    held[-1].value = states.values[0, head, -1].double()
                    given = grouped[head].sum(0).tolist()
                    highest = grouped[head].amax(0).tolist()
                    for token, mass, peak in zip(held, given, highest, strict=True):
                        token.late = (0.0 if begins else token.late) + late_weight * mass * late
                        token.mass *= decay
                        if scored:
                            token.mass += weight * mass
                            token.peak = max(token.peak, peak)
            if t + 1 < n:
                logs = torch.log_softmax(output.logits[0, -1].double(), -1)
                result.log_likelihoods.append(logs[tokens[t + 1]].item())
    return result


def ranked(*rankings: tuple[Callable[[Token, int], float], float], sinks: int = 4) -> Choose:
    """Each head for itself: (key, share of the budget) in order, the first takes what is left."""

    def choose(candidates, num_tokens, room, budget):
        return [
            [_choose_one(held, num_tokens, room, budget, rankings, sinks) for held in layer]
            for layer in candidates
        ]

    return choose


def together(key: Callable[[Token, int], float], whole_model: bool = False) -> Choose:
    """All heads of a layer, or of the whole model, keep one set, by the sum of ``key``."""

    def choose(candidates, num_tokens, room, budget):
        sets = []
        for layers in [candidates] if whole_model else [[layer] for layer in candidates]:
            total: dict[int, float] = {}
            for t in [t for layer in layers for held in layer for t in held]:
                total[t.position] = total.get(t.position, 0.0) + key(t, num_tokens)
            sets += [_by(total, num_tokens, room, budget)] * len(layers)
        return [[one] * len(layer) for one, layer in zip(sets, candidates, strict=True)]

    return choose


def pooled(key: Callable[[Token, int], float], width: int) -> Choose:
    """Each head for itself, by the mean of ``key`` over neighbours in the sequence."""

    def choose(candidates, num_tokens, room, budget):
        chosen = []
        for layer in candidates:
            chosen.append([])
            for held in layer:
                ordered = sorted(held, key=lambda t: t.position)
                means = {}
                for i, t in enumerate(ordered):
                    near = ordered[max(0, i - width // 2) : i + width // 2 + 1]
                    means[t.position] = sum(key(n, num_tokens) for n in near) / len(near)
                chosen[-1].append(_by(means, num_tokens, room, budget))
        return chosen

    return choose


def unlike_the_mean() -> Choose:
    """Each head for itself: the keys that point away from their mean direction."""

    def choose(candidates, num_tokens, room, budget):
        chosen = []
        for layer in candidates:
            chosen.append([])
            for held in layer:
                chosen[-1].append(_by(_away(held), num_tokens, room, budget))
        return chosen

    return choose


def then_unlike_the_mean(key: Callable[[Token, int], float], share: float) -> Choose:
    """Each head for itself: by ``key``, then ``share`` of the budget as ``unlike_the_mean``."""

    def one(held, num_tokens, room, budget):
        away = _away(held)
        rankings = ((key, 0.0), (lambda t, now: away[t.position], share))
        return _choose_one(held, num_tokens, room, budget, rankings, 4)

    def choose(candidates, num_tokens, room, budget):
        return [[one(held, num_tokens, room, budget) for held in layer] for layer in candidates]

    return choose


def _away(held: list[Token]) -> dict[int, float]:
    mean = sum(t.key / t.key.norm() for t in held) / len(held)
    return {t.position: -float(t.key @ mean / t.key.norm() / mean.norm()) for t in held}


def _by(ranks: dict[int, float], num_tokens, room, budget):
    tokens = [Token(position, mass=rank) for position, rank in ranks.items()]
    return _choose_one(tokens, num_tokens, room, budget, [(lambda t, now: t.mass, 1.0)], 4)


def _choose_one(held, num_tokens, room, budget, rankings, sinks):
    stay = {t.position for t in held if t.position < sinks}
    later = [round(budget * share) for _, share in rankings[1:]]
    for (key, _), count in zip(rankings, [room - sum(later), *later], strict=True):
        left = [t for t in held if t.position not in stay]
        left.sort(key=lambda t: (key(t, num_tokens), t.position), reverse=True)
        first = not math.isinf(count) and key is rankings[0][0]
        stay |= {t.position for t in left[: count - (len(stay) if first else 0)]}
    assert len(stay) == room
    return stay
