"""How fast the Triton kernels are, against copy bandwidth and FlashAttention itself.

    python -m harness.bench.kernels --output results/kernels-gpu.json

Every case times FlashAttention on the same batch in the same process (CUDA events, median).
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

from ..records.files import write_json
from ..records.provenance import SCHEMA_VERSION, provenance, timestamp
from .output import output_file

SHAPES = {
    "llama-3.1-8b": {"heads": 32, "kv_heads": 8, "head_size": 128},
    "smollm2-135m": {"heads": 9, "kv_heads": 3, "head_size": 64},
}
BATCHES = {
    # name: rows of (queries, live tokens)
    "decode 128 x 4096": [(1, 4096)] * 128,
    "decode 96 x 448": [(1, 448)] * 96,
    "chunk 8192 of 8192": [(8192, 8192)],
    "chunk 2048 of 16384": [(2048, 16384)],
    "chunk 2 x 4096": [(4096, 4096)] * 2,
}


class Case:
    """One batch on the GPU, with FlashAttention's result for it."""

    def __init__(self, shape: dict[str, int], rows: list[tuple[int, int]], block_size: int) -> None:
        import torch
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

        torch.manual_seed(0)
        heads, kv_heads, self.head_size = shape["heads"], shape["kv_heads"], shape["head_size"]
        self.rows, self.kv_heads, self.block_size = rows, kv_heads, block_size
        width = max(-(-length // block_size) for _, length in rows)
        blocks = sum(-(-length // block_size) for _, length in rows)
        num_tokens = sum(queries for queries, _ in rows)

        def draw(*size: int) -> Any:
            return torch.randn(*size, device="cuda").to(torch.bfloat16)

        self.cache = draw(blocks + 1, kv_heads, block_size, 2 * self.head_size)
        self.query = draw(num_tokens, heads, self.head_size)
        self.out = torch.empty_like(self.query)
        ids = torch.randperm(blocks, device="cuda").to(torch.int32) + 1
        self.table = torch.zeros(len(rows), width, dtype=torch.int32, device="cuda")
        taken = 0
        for row, (_, length) in enumerate(rows):
            count = -(-length // block_size)
            self.table[row, :count] = ids[taken : taken + count]
            taken += count
        lens = [length for _, length in rows]
        self.lens = torch.tensor(lens, dtype=torch.int32, device="cuda")
        self.max_len, self.max_queries = max(lens), max(queries for queries, _ in rows)
        starts = torch.tensor([0] + [queries for queries, _ in rows]).cumsum(0)
        self.starts = starts.to(device="cuda", dtype=torch.int32)
        self.flags = torch.full((len(rows),), 15, dtype=torch.int32, device="cuda")
        self.mass = torch.zeros(blocks + 1, dtype=torch.int64, device="cuda")
        self.token_mass = torch.zeros(blocks + 1, kv_heads, block_size, device="cuda")
        self.token_peak = torch.zeros_like(self.token_mass)
        self.version = get_flash_attn_version(head_size=self.head_size)
        self.lse = self.attend()

    @property
    def key_bytes(self) -> int:
        return sum(length for _, length in self.rows) * self.kv_heads * self.head_size * 2

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
            fa_version=self.version,
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
            "one_query": self.max_queries == 1,
        }
        if by_token:
            add_token_mass(queries, self.token_mass, self.token_peak, **options)
        else:
            add_block_mass(queries, self.mass, **options)


def median_ms(function: Any) -> float:
    from triton.testing import do_bench

    return do_bench(function, warmup=20, rep=80, return_mode="median")


def copy_bandwidth() -> float:
    """Device-to-device copy, bytes read plus bytes written per second."""
    import torch

    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (median_ms(lambda: target.copy_(source)) / 1e3)


def tiles(decode: bool, sweep: bool) -> list[Any]:
    from vllm_plugins.kernels.attention_mass import Tile

    if not sweep:
        return [None]
    if decode:
        return [Tile(16, n, w, s) for n in (64, 128, 256) for w in (2, 4, 8) for s in (2, 3, 4)]
    return [
        Tile(m, n, w, s) for m in (64, 128) for n in (64, 128, 256) for w in (4, 8) for s in (2, 3)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help="all tile shapes, not the chosen one")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--output", type=output_file, required=True)
    arguments = parser.parse_args()
    bandwidth = copy_bandwidth()
    print(f"copy {bandwidth / 1e12:.2f} TB/s")
    measured = []
    for shape in arguments.shapes:
        for name, rows in BATCHES.items():
            case = Case(SHAPES[shape], rows, arguments.block_size)
            decode = name.startswith("decode")
            attention = median_ms(case.attend)
            windows = (None,) if decode else (None, 32)
            for by_token, window in itertools.product((False, True), windows):
                best = None
                for tile in tiles(decode, arguments.sweep):
                    for programs in (1024, 2048, 4096) if decode and arguments.sweep else (2048,):
                        options = {"tile": tile, "window": window, "programs": programs}
                        try:
                            ms = median_ms(lambda o=options, c=case, t=by_token: c.score(t, **o))
                        except Exception as error:  # a tile too large for shared memory
                            print(f"  {tile}: {type(error).__name__}")
                            continue
                        entry = {
                            "shape": shape,
                            "batch": name,
                            "scores": "tokens" if by_token else "blocks",
                            "block_size": arguments.block_size,
                            "window": window,
                            "tile": vars(tile) if tile else "default",
                            "programs": programs,
                            "ms": ms,
                            "attention_ms": attention,
                            "key_bytes": case.key_bytes,
                            "share_of_copy_bandwidth": case.key_bytes / (ms / 1e3) / bandwidth,
                        }
                        measured.append(entry)
                        if best is None or ms < best["ms"]:
                            best = entry
                assert best is not None
                print(
                    f"{shape:13} {name:20} {best['scores']} window {window or 'all':>3}  "
                    f"{best['ms'] * 1e3:8.1f} us  FlashAttention {attention * 1e3:8.1f} us  "
                    f"ratio {best['ms'] / attention:5.2f}  "
                    f"{100 * best['share_of_copy_bandwidth']:5.1f}% of copy  "
                    f"{best['tile']} {best['programs']}",
                    flush=True,
                )
            del case
    record = {
        "schema_version": SCHEMA_VERSION,
        "timestamp": timestamp(),
        "benchmark": "kernels",
        "copy_bandwidth_bytes_per_second": bandwidth,
        "measured": measured,
        **provenance([__spec__.name], "cuda"),
    }
    write_json(arguments.output, record)


if __name__ == "__main__":
    main()
