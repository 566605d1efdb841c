"""Token-level eviction in plain PyTorch over a Transformers model, one token at a time.

Written from the definitions, not from the plugin: a cache of single tokens (block size 1) per
layer, from which evicted tokens are deleted, and attention probabilities as Transformers
reports them. Only ``cab`` borrows the plugin's policy function ("the same decisions").
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import DynamicCache

from .windowed import full_layers, pass_windows


@dataclass
class OracleResult:
    log_likelihoods: list[float] = field(default_factory=list)
    decisions: list[dict] = field(default_factory=list)


def h2o_by_definition(block_scores: dict[int, float], keep: int, sinks: int) -> list[int]:
    """20% of the budget by position, the rest by score, the sinks always."""
    blocks = sorted(block_scores)
    recent = max(1, round(0.2 * keep))
    protected = {b for b in blocks if b < sinks} | set(blocks[-recent:])
    others = sorted((b for b in blocks if b not in protected), key=lambda b: -block_scores[b])
    return sorted(protected | set(others[: keep - len(protected)]))


@torch.no_grad()
def run(
    model,
    tokens: list[int],
    *,
    keep: int,
    chunk: int,
    block_size: int,
    layer_groups: int = 1,
    group_of: list[int] | None = None,
    select,
    half_life: float | None = None,
    window: int | None = None,
    prompt: int | None = None,
    every: int = 1,
    every_of_prompt: int = 1,
    in_full: int = 0,
    layer_stride: int = 1,
    sinks: int = 1,
) -> OracleResult:
    """``select(block_scores, keep, sinks, graph) -> kept blocks`` decides per layer group.

    Tokens come in chunks, from ``prompt`` on one by one: of these, every ``every``-th is scored
    and counts for all of them; ``every_of_prompt`` is the like for longer chunks but the
    ``in_full`` last queries of each. ``group_of``: each layer's group, where groups are not equal
    parts.
    """
    model.set_attn_implementation("eager")
    layers = full_layers(model.config)
    if group_of is None:
        group_of = [place * layer_groups // len(layers) for place in range(len(layers))]
    layer_groups = max(group_of) + 1
    cache = DynamicCache()
    alive = [list(range(0)) for _ in range(layer_groups)]  # token positions in the cache
    score = [dict() for _ in range(layer_groups)]
    graph = [dict() for _ in range(layer_groups)]  # (query token, key token) -> mass
    result = OracleResult()
    n = len(tokens)
    decay = 1.0 if half_life is None else 0.5 ** (1.0 / half_life)

    prompt = n if prompt is None else prompt
    starts = [*range(0, prompt, chunk), *range(prompt, n)]
    for start, stop in zip(starts, [*starts[1:], n], strict=True):
        for group in range(layer_groups):
            full = sorted({p // block_size for p in alive[group]})
            full = [b for b in full if (b + 1) * block_size <= start]
            if len(full) <= keep:
                continue
            block_scores = {
                b: sum(score[group][p] for p in range(b * block_size, (b + 1) * block_size))
                for b in full
            }
            matrix = np.zeros((len(full), len(full)))
            index = {b: i for i, b in enumerate(full)}
            for (q, k), mass in graph[group].items():
                if q // block_size in index and k // block_size in index:
                    matrix[index[q // block_size], index[k // block_size]] += mass
            kept = select(block_scores, keep, sinks, matrix)
            gone = set(full) - set(kept)
            stay = [i for i, p in enumerate(alive[group]) if p // block_size not in gone]
            alive[group] = [alive[group][i] for i in stay]
            for place, layer in enumerate(layers):
                if group_of[place] == group:
                    entry = cache.layers[layer]
                    entry.keys = entry.keys[:, :, stay]
                    entry.values = entry.values[:, :, stay]
            result.decisions.append({"group": group, "tokens": start, "kept": list(kept)})
        for t in range(start, stop):
            pass_windows(cache, model.config)
            for positions in alive:
                positions.append(t)
            output = model(
                input_ids=torch.tensor([[tokens[t]]]),
                position_ids=torch.tensor([[t]]),
                # Nothing in the cache is hidden; groups hold different numbers of keys, and a
                # single zero broadcasts to each of them.
                attention_mask=torch.zeros(1, 1, 1, 1),
                past_key_values=cache,
                use_cache=True,
                output_attentions=True,
            )
            for group in range(layer_groups):
                for p in score[group]:
                    score[group][p] *= decay
                score[group][t] = 0.0
            single = stop - start == 1
            weight = every if single else 1 if t >= stop - in_full else every_of_prompt
            if t % weight == 0 and (single or window is None or t >= stop - window):
                for place, layer in enumerate(layers):
                    group = group_of[place]
                    if (place - group_of.index(group)) % layer_stride:
                        continue
                    received = output.attentions[layer][0, :, 0].double().sum(0).tolist()
                    for p, mass in zip(alive[group], received, strict=True):
                        score[group][p] += weight * mass
                        graph[group][t, p] = graph[group].get((t, p), 0.0) + weight * mass
            if t + 1 < n:
                logs = torch.log_softmax(output.logits[0, -1].double(), -1)
                result.log_likelihoods.append(logs[tokens[t + 1]].item())
    return result
