"""The kernels that add attention mass, beside FlashAttention on the same batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

from .shapes import ELEMENT_BYTES, SHAPES

BATCHES = {
    # name: rows of (queries, live tokens)
    "decode 128 x 4096": [(1, 4096)] * 128,
    "decode 96 x 448": [(1, 448)] * 96,
    "decode 512 x 320, one in 8 scored": [(1, 320)] * 512,
    "decode 512 x 320, one in 8 by chance": [(1, 320)] * 512,
    "chunk 8192 of 8192": [(8192, 8192)],
    "chunk 2048 of 16384": [(2048, 16384)],
    "chunk 2 x 4096": [(4096, 4096)] * 2,
}
SCORED_EVERY = {"decode 512 x 320, one in 8 scored": 8, "decode 512 x 320, one in 8 by chance": 8}
"""Of these batches one row in N is scored, as of many decodes at different places; else each."""
BY_CHANCE = {"decode 512 x 320, one in 8 by chance"}
"""Of these the scored rows are drawn; else it is every N-th."""
TOKEN_SCORE_BYTES = 16
"""Of a token and KV head: mass and peak, each float32, read and written."""


class MassCase:
    """One batch, with FlashAttention's result for it."""

    def __init__(
        self,
        shape: dict[str, int],
        rows: list[tuple[int, int]],
        block_size: int,
        every: int = 1,
        by_chance: bool = False,
        device: str = "cuda",
    ) -> None:
        import torch

        torch.manual_seed(0)
        scored = torch.arange(0, len(rows), every)
        if by_chance:
            scored = torch.randperm(len(rows))[: len(scored)]
        self.heads, self.kv_heads = shape["heads"], shape["kv_heads"]
        self.head_size, self.rows = shape["head_size"], rows
        self.every, self.scored = every, [rows[row] for row in scored.tolist()]
        width = max(-(-length // block_size) for _, length in rows)
        blocks = sum(-(-length // block_size) for _, length in rows)
        num_tokens = sum(queries for queries, _ in rows)

        def draw(*size: int) -> Any:
            return torch.randn(*size, device=device).to(torch.bfloat16)

        self.cache = draw(blocks + 1, self.kv_heads, block_size, 2 * self.head_size)
        self.query = draw(num_tokens, self.heads, self.head_size)
        self.out = torch.empty_like(self.query)
        ids = torch.randperm(blocks, device=device).to(torch.int32) + 1
        self.table = torch.zeros(len(rows), width, dtype=torch.int32, device=device)
        taken = 0
        for row, (_, length) in enumerate(rows):
            count = -(-length // block_size)
            self.table[row, :count] = ids[taken : taken + count]
            taken += count
        lens = [length for _, length in rows]
        self.lens = torch.tensor(lens, dtype=torch.int32, device=device)
        self.max_len, self.max_queries = max(lens), max(queries for queries, _ in rows)
        starts = torch.tensor([0] + [queries for queries, _ in rows]).cumsum(0)
        self.starts = starts.to(device=device, dtype=torch.int32)
        self.flags = torch.zeros(len(rows), dtype=torch.int32, device=device)
        self.flags[scored.to(device)] = 15
        self.mass = torch.zeros(blocks + 1, dtype=torch.int64, device=device)
        self.token_mass = torch.zeros(blocks + 1, self.kv_heads, block_size, device=device)
        self.token_peak = torch.zeros_like(self.token_mass)
        self.lse = self.attend()

    @property
    def decode(self) -> bool:
        return self.max_queries == 1

    @property
    def key_bytes(self) -> int:
        """Of keys that scoring reads."""
        tokens = sum(length for _, length in self.scored)
        return tokens * self.kv_heads * self.head_size * ELEMENT_BYTES

    def score_bytes(self, by_token: bool) -> int:
        """Of tokens' scores, read and written. A block's are next to nothing."""
        tokens = sum(length for _, length in self.scored)
        return tokens * self.kv_heads * TOKEN_SCORE_BYTES if by_token else 0

    def product_flops(self, rows: list[tuple[int, int]], window: int | None = None) -> int:
        """Of one product of the queries of ``rows`` with the keys they see; attention itself makes
        two such.

        ``window``: only so many last queries of a row count.
        """
        pairs = 0
        for queries, length in rows:
            scored = queries if window is None else min(queries, window)
            pairs += scored * (2 * length - scored + 1) // 2
        return 2 * self.head_size * self.heads * pairs

    @cached_property
    def _version(self) -> Any:
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

        return get_flash_attn_version(head_size=self.head_size)

    def attend(self) -> Any:
        """FlashAttention on the batch; returns its log-sum-exp."""
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

        keys, values = self.cache.transpose(1, 2).split(self.head_size, dim=-1)
        return flash_attn_varlen_func(
            q=self.query,
            k=keys,
            v=values,
            out=self.out,
            cu_seqlens_q=self.starts,
            max_seqlen_q=self.max_queries,
            seqused_k=self.lens,
            max_seqlen_k=self.max_len,
            softmax_scale=self.head_size**-0.5,
            causal=True,
            block_table=self.table,
            fa_version=self._version,
            return_softmax_lse=True,
        )[1]

    def score(self, by_token: bool, **options: Any) -> None:
        """The batch's attention mass, by block, or by token and head with the largest ever."""
        from vllm_plugins.kernels.attention_mass import Queries
        from vllm_plugins.kernels.block_mass import add_block_mass
        from vllm_plugins.kernels.token_mass import add_token_mass

        queries = Queries(
            self.query,
            self.cache,
            self.lse,
            self.table,
            self.lens,
            self.starts,
            self.flags,
            self.head_size**-0.5,
        )
        options |= {
            "rows": (0, len(self.rows)),
            "max_seq_len": self.max_len,
            "one_query": self.decode,
            "decode_weight": self.every,
        }
        if by_token:
            add_token_mass(queries, self.token_mass, self.token_peak, **options)
        else:
            add_block_mass(queries, self.mass, **options)


def tiles(decode: bool, sweep: bool) -> list[Any]:
    """The chosen tile, or all of a sweep."""
    from vllm_plugins.kernels.attention_mass import Tile

    if not sweep:
        return [None]
    if decode:
        return [Tile(16, n, w, s) for n in (64, 128, 256) for w in (1, 2, 4) for s in (1, 2, 3, 4)]
    return [
        Tile(m, n, w, s) for m in (64, 128) for n in (64, 128, 256) for w in (4, 8) for s in (2, 3)
    ]


def measure_mass(
    shape: str,
    block_size: int,
    bandwidth: float,
    sweep: bool,
    timer: Callable[[Callable[[], Any]], float],
) -> Iterator[dict[str, Any]]:
    """Entries of all batches; of a sweep, every tile's.

    Args:
        shape: of ``SHAPES``.
        block_size: tokens.
        bandwidth: of a copy, bytes per second.
        sweep: all tiles, not the chosen one.
        timer: gives milliseconds (``device_time.median_ms``).

    """
    from vllm_plugins.kernels.attention_mass import PROGRAMS

    for name, rows in BATCHES.items():
        every = SCORED_EVERY.get(name, 1)
        case = MassCase(SHAPES[shape], rows, block_size, every, name in BY_CHANCE)
        attention_ms = timer(case.attend)
        windows = (None,) if case.decode else (None, 32)
        for by_token, window in itertools.product((False, True), windows):
            made = []
            for tile in tiles(case.decode, sweep):
                for programs in (512, 1024, 2048) if case.decode and sweep else (PROGRAMS,):
                    options = {"tile": tile, "window": window, "programs": programs}
                    try:
                        ms = timer(partial(case.score, by_token, **options))
                    except Exception as error:
                        if not sweep:
                            raise
                        # A tile too large for shared memory.
                        print(f"  {tile}: {type(error).__name__}")
                        continue
                    entry = {
                        "shape": shape,
                        "batch": name,
                        "block_size": block_size,
                        "tile": vars(tile) if tile else "default",
                        "programs": programs,
                        **mass_entry(case, by_token, window, ms, attention_ms, bandwidth),
                    }
                    made.append(entry)
                    yield entry
            print(told(min(made, key=lambda entry: entry["ms"])), flush=True)
        del case


def mass_entry(
    case: MassCase,
    by_token: bool,
    window: int | None,
    ms: float,
    attention_ms: float,
    bandwidth: float,
) -> dict[str, Any]:
    """What follows from the times of one launch and of FlashAttention on the same batch.

    A decode is bound by the bytes it reads and writes, a chunk by its products.
    """
    key_bytes, score_bytes = case.key_bytes, case.score_bytes(by_token)
    flops = case.product_flops(case.scored, window)
    attention_flops = 2 * case.product_flops(case.rows)
    return {
        "scores": "tokens" if by_token else "blocks",
        "window": window,
        "ms": ms,
        "attention_ms": attention_ms,
        "ratio_to_attention": ms / attention_ms,
        "key_bytes": key_bytes,
        "score_bytes": score_bytes,
        "share_of_copy_bandwidth": (key_bytes + score_bytes) / (ms / 1e3) / bandwidth,
        "flops": flops,
        "flops_per_second": flops / (ms / 1e3),
        "attention_flops_per_second": attention_flops / (attention_ms / 1e3),
    }


def told(entry: dict[str, Any]) -> str:
    """A line for the terminal."""
    return (
        f"{entry['shape']:13} {entry['batch']:20} {entry['scores']} "
        f"window {entry['window'] or 'all':>3}  {entry['ms'] * 1e3:8.1f} us  "
        f"FlashAttention {entry['attention_ms'] * 1e3:8.1f} us  "
        f"ratio {entry['ratio_to_attention']:5.2f}  "
        f"{100 * entry['share_of_copy_bandwidth']:5.1f}% of copy  "
        f"{entry['flops_per_second'] / 1e12:6.1f} TFLOP/s  {entry['tile']} {entry['programs']}"
    )
