"""Kernel cases and float64 references, for Triton's interpreter (here) and for a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vllm_plugins.attention.compaction import compact
from vllm_plugins.kernels import FRACTION_BITS, NEEDED, SCORED
from vllm_plugins.kernels.attention_mass import Queries
from vllm_plugins.kernels.block_mass import add_block_mass

ONE = 2**FRACTION_BITS


@dataclass
class Batch:
    """A mixed batch over a paged cache, and what its rows look like without pages."""

    query: torch.Tensor
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    flags: torch.Tensor
    lse: torch.Tensor
    scale: float
    soft_cap: float
    probabilities: list[torch.Tensor]  # a row: float64 [heads, queries, live tokens]
    query_scale: torch.Tensor | None = None
    key_scale: torch.Tensor | None = None

    @property
    def max_seq_len(self) -> int:
        return int(self.seq_lens.max())

    @property
    def queries(self) -> Queries:
        return Queries(
            self.query,
            self.kv_cache,
            self.lse,
            self.block_table,
            self.seq_lens,
            self.query_start_loc,
            self.flags,
            self.scale,
            self.soft_cap,
            self.query_scale,
            self.key_scale,
        )


def make_batch(
    rows,
    *,
    device="cpu",
    dtype=torch.float32,
    heads=4,
    kv_heads=2,
    head_size=16,
    block_size=16,
    soft_cap=0.0,
    seed=0,
    unscored=(),
    scales=None,
) -> Batch:
    """``rows``: (queries, live tokens) each; a row of (0, 0) is padding.

    ``scales``: ``layer`` or ``head``; queries and cache are float8 then, with a scale of the layer,
    or one of each KV head.
    """
    query_scale, key_scale = quantised(scales, kv_heads) if scales else (None, None)
    dtype = torch.float8_e4m3fn if scales else dtype
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    width = max(-(-length // block_size) for _, length in rows) + 2
    num_blocks = sum(-(-length // block_size) for _, length in rows) + 3
    cache = torch.randn(num_blocks, kv_heads, block_size, 2 * head_size, generator=generator)
    cache = cache.to(dtype).float()
    num_tokens = sum(queries for queries, _ in rows)
    query = (2.0 * torch.randn(num_tokens, heads, head_size, generator=generator)).to(dtype)
    free = iter(rng.permutation(num_blocks - 1) + 1)
    table = torch.full((len(rows), width), 10**6, dtype=torch.int32)  # never read behind the end
    lse = torch.full((heads, num_tokens + 3), float("nan"))
    scale = head_size**-0.5
    probabilities, start = [], 0
    for row, (queries, length) in enumerate(rows):
        blocks = [int(next(free)) for _ in range(-(-length // block_size))]
        table[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        keys = cache[blocks][..., :head_size].transpose(0, 1).reshape(kv_heads, -1, head_size)
        keys = keys[:, :length].double().repeat_interleave(heads // kv_heads, 0)
        own = query[start : start + queries].double().transpose(0, 1)
        logits = own @ keys.transpose(1, 2) * scale
        if scales:
            both = (query_scale * key_scale).double().expand(kv_heads)
            logits *= both.repeat_interleave(heads // kv_heads)[:, None, None]
        if soft_cap:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        place = torch.arange(length)[None, :]
        last = torch.arange(length - queries, length)[:, None]
        logits.masked_fill_(place > last, float("-inf"))
        lse[:, start : start + queries] = torch.logsumexp(logits, -1).float()
        probabilities.append(torch.softmax(logits, -1))
        start += queries
        for block in blocks:  # what lies behind the sequence must not matter
            if block == blocks[-1] and length % block_size:
                cache[block, :, length % block_size :] = float("nan")
    starts = np.concatenate(([0], np.cumsum([queries for queries, _ in rows])))
    flags = [0 if row in unscored else NEEDED | SCORED for row in range(len(rows))]
    return Batch(
        query.to(device),
        cache.to(dtype).to(device),
        table.to(device),
        torch.tensor([length for _, length in rows], dtype=torch.int32, device=device),
        torch.tensor(starts, dtype=torch.int32, device=device),
        torch.tensor(flags, dtype=torch.int32, device=device),
        lse.to(device),
        scale,
        soft_cap,
        probabilities,
        *(None if scale is None else scale.to(device) for scale in (query_scale, key_scale)),
    )


def quantised(scales: str, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales of queries and keys, of a layer or of each of its heads."""
    if scales == "layer":
        return torch.tensor(0.5), torch.tensor([1.25])  # vLLM has both shapes
    return 0.5 + 0.5 * torch.arange(kv_heads), 1.5 - 0.5 * torch.arange(kv_heads)


def add(batch: Batch, mass: torch.Tensor, rows=None, one_query=False, **options) -> torch.Tensor:
    """``add_block_mass`` on the batch; returns ``mass``."""
    add_block_mass(
        batch.queries,
        mass,
        rows=rows or (0, len(batch.seq_lens)),
        max_seq_len=batch.max_seq_len,
        one_query=one_query,
        **options,
    )
    return mass


def compare(mass: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(mass.double().cpu() / ONE, expected, rtol=1e-4, atol=1e-4)


def expected_mass(
    batch: Batch,
    window: int | None = None,
    decay: float = 1.0,
    decode_weight: int = 1,
    skip: int = 0,
    stride: int = 1,
) -> torch.Tensor:
    """Float64 ``[num_blocks]``."""
    num_blocks, _, block_size, _ = batch.kv_cache.shape
    mass = torch.zeros(num_blocks, dtype=torch.float64)
    table, flags = batch.block_table.cpu(), batch.flags.cpu()
    for row, p in enumerate(batch.probabilities):
        _, queries, length = p.shape
        if not flags[row] & SCORED or queries == 0:
            continue
        weight = decay ** torch.arange(queries - 1, -1, -1, dtype=torch.float64)
        if window is not None:
            weight[: max(0, queries - window)] = 0.0
        if queries == 1:
            weight *= 0 if skip else decode_weight
        else:
            weight *= sampled(length - queries, length, skip, stride)
        per_token = (p * weight[None, :, None]).sum((0, 1))
        for place in range(length):
            mass[table[row, place // block_size]] += per_token[place]
    return mass


def sampled(start: int, stop: int, skip: int, stride: int) -> torch.Tensor:
    """What each place counts if every ``stride``-th is scored for all but the last ``skip``."""
    place = torch.arange(start, stop)
    return stride * ((place % stride == 0) & (place < stop - skip)).double()


def random_table(seed: int, block_size: int, device="cpu"):
    """A block table with nulls anywhere among the full blocks, and padding rows of length 0."""
    generator = torch.Generator().manual_seed(seed)
    rows, width = 7, 600 if seed % 3 == 0 else 13
    seq_lens = torch.randint(0, width * block_size + 1, (rows,), generator=generator)
    seq_lens[2] = 0
    table = torch.randint(1, 10**6, (rows, width), generator=generator, dtype=torch.int32)
    evicted = torch.rand(rows, width, generator=generator) < 0.5
    for row, length in enumerate(seq_lens.tolist()):
        evicted[row, length // block_size :] = False
    table[evicted] = 0
    return table.to(device), seq_lens.int().to(device)


def check_compaction(kernel, seed: int, block_size: int, device="cpu") -> None:
    table, seq_lens = random_table(seed, block_size, device)
    out_table, out_lens = torch.full_like(table, -7), torch.full_like(seq_lens, -7)
    kernel(table, seq_lens, block_size, out_table, out_lens)
    reference = compact(table.cpu(), seq_lens.cpu(), block_size)
    assert reference is not None
    assert torch.equal(out_lens.cpu(), reference[1])
    for row, length in enumerate(reference[1].tolist()):
        num_blocks = -(-length // block_size)
        assert torch.equal(out_table[row, :num_blocks].cpu(), reference[0][row, :num_blocks])


MIXED = [(1, 40), (1, 1), (1, 300), (0, 0), (7, 7), (33, 150), (20, 16 * 9)]
"""Decodes, a padding row, a whole short prompt, chunks with a past, a length of full blocks."""
