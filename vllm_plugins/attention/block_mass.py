"""How much attention each block received: the exact sum, in plain torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch

QUERIES_AT_ONCE = 32
"""Keeps the ``[heads, queries, tokens]`` scratch in a core's cache at usual lengths."""


def block_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    places: torch.Tensor,
    weights: torch.Tensor,
    block_size: int,
    scale: float,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    query_blocks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention probability mass per block, summed over heads, for one request.

    Query ``t`` sees keys ``0 .. places[t]``. The softmax is the exact one, in float32.

    Args:
        query: ``[num_queries, num_heads, head_size]``.
        key: ``[num_kv_heads, num_blocks * block_size, head_size]``, ``num_heads`` a multiple of
            ``num_kv_heads``; entries that no query sees are ignored.
        places: int ``[num_queries]``, rising, of the queries among the keys.
        weights: float32 ``[num_queries]``, what each query counts.
        block_size: tokens per block.
        scale: of the logits.
        soft_cap: logits become ``soft_cap * tanh(logits / soft_cap)``; 0 = off.
        sinks: ``[num_heads]``, a learned logit of each head that takes part in its softmax and
            stands for no key; None: there is none.
        query_blocks: int ``[num_queries]``, consecutive from 0; where given, the mass is summed
            per block of queries instead of over all of them.

    Returns:
        float32 ``[num_blocks]``, or ``[query_blocks.max() + 1, num_blocks]``.

    """
    num_keys = key.shape[1]
    tokens = torch.zeros(num_keys)
    graph = torch.zeros(0 if query_blocks is None else int(query_blocks[-1]) + 1, num_keys)
    for start, stop, seen in probabilities(query, key, places, scale, soft_cap, sinks):
        num_seen = seen.shape[-1]
        if query_blocks is None:
            counts = weights[start:stop].repeat(query.shape[1])
            tokens[:num_seen] += counts @ seen.flatten(0, 2)
        else:
            per_query = seen.sum((0, 1)) * weights[start:stop, None]
            graph[:, :num_seen].index_add_(0, query_blocks[start:stop], per_query)
    mass = tokens if query_blocks is None else graph
    return mass.unflatten(-1, (-1, block_size)).sum(-1)


def probabilities(
    query: torch.Tensor,
    key: torch.Tensor,
    places: torch.Tensor,
    scale: float,
    soft_cap: float,
    sinks: torch.Tensor | None = None,
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Causal attention of a request's queries to its keys, some queries at a time.

    Args:
        query, key, places, scale, soft_cap, sinks: as ``block_mass``.

    Yields:
        start and stop of the queries, and float32
        ``[num_kv_heads, heads per KV head, stop - start, num_seen]``, contiguous: of the keys that
        the last of them sees.

    """
    num_queries, num_heads, head_size = query.shape
    num_kv_heads = key.shape[0]
    group = num_heads // num_kv_heads
    transposed = key.float().transpose(1, 2)
    grouped = (query.float() * scale).view(num_queries, num_kv_heads, group, head_size)
    grouped = grouped.permute(1, 2, 0, 3)
    for start in range(0, num_queries, QUERIES_AT_ONCE):
        stop = min(start + QUERIES_AT_ONCE, num_queries)
        first_hidden, num_seen = (int(places[i]) + 1 for i in (start, stop - 1))
        rows = grouped[:, :, start:stop].flatten(1, 2)
        logits = torch.matmul(rows, transposed[..., :num_seen])
        logits = logits.view(num_kv_heads, group, stop - start, num_seen)
        if soft_cap:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        # The first query sees all keys before ``first_hidden``, and so do those after it.
        hidden = torch.arange(first_hidden, num_seen) > places[start:stop, None]
        logits[..., first_hidden:].masked_fill_(hidden, float("-inf"))
        if sinks is None:
            yield start, stop, torch.softmax(logits, dim=-1)
        else:
            sink = sinks.float().view(*logits.shape[:2], 1, 1).expand(*logits.shape[:3], 1)
            joined = torch.softmax(torch.cat((logits, sink), dim=-1), dim=-1)
            yield start, stop, joined[..., :num_seen].contiguous()
