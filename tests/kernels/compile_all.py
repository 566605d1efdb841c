"""Compile every kernel for a Hopper GPU where there is none; prints one line of JSON.

A process of its own, as Triton decides when a kernel is defined whether it interprets it. Kernels
go through the functions that launch them, so they are compiled for what a launch would ask for.
"""

from __future__ import annotations

import importlib
import json
import pkgutil

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from harness.bench.pack_kernels import POLICIES, PackCase, Packs
from vllm_plugins import kernels
from vllm_plugins.kernels import NEEDED, SCORED, TOKENS_SCORED
from vllm_plugins.kernels.attention_mass import launch
from vllm_plugins.kernels.block_scores import add_key_norms, age_blocks, start_blocks
from vllm_plugins.kernels.compact import compact_block_table
from vllm_plugins.kernels.token_mass import start_tokens

from .cases import make_batch, random_table


class Hopper:
    """As much of a driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def mass(decays=(0.0,), **shape) -> None:
    """Scores by token, with peaks and without, and by block; of decodes, chunks, last queries."""
    for rows, options in (
        ([(1, 40), (1, 300)], {"one_query": True}),
        ([(20, 40), (1, 16)], {"one_query": False}),
        ([(20, 40), (1, 16)], {"one_query": False, "window": 8}),
    ):
        batch = make_batch(rows, **shape)
        options |= {"rows": (0, len(rows)), "max_seq_len": batch.max_seq_len}
        by_block = torch.zeros(len(batch.kv_cache), dtype=torch.int64)
        launch(batch.queries, SCORED, by_block, None, by_token=False, **options)
        by_token = torch.zeros(batch.kv_cache.shape[:3])
        for peak in (None, torch.zeros_like(by_token)):
            for log2_decay in decays:
                options["log2_decay"] = log2_decay
                launch(batch.queries, TOKENS_SCORED, by_token, peak, by_token=True, **options)


def packing() -> None:
    """Of few tokens, and of more than a program holds."""
    for packs in (Packs(2, 48, 32, 64, 200, 400), Packs(1, 320, 3600, 400, 4000, 4000)):
        for policy in POLICIES:
            shape = {"heads": 8, "kv_heads": 2, "head_size": 128, "layers": 2}
            case = PackCase(shape, packs, policy, 16, "cpu")
            case.move(case.choose())


def bookkeeping() -> None:
    """What is launched once a step."""
    batch = make_batch([(3, 50), (1, 20)], dtype=torch.bfloat16, scales=None)
    cache, slots = batch.kv_cache, torch.tensor([16, 17, -1])
    channels = [torch.zeros(len(cache), dtype=torch.int64) for _ in range(3)]
    start_blocks(slots, 16, *channels)
    add_key_norms(slots, cache, channels[0])
    rows = (batch.block_table, batch.seq_lens, batch.query_start_loc)
    options = {"block_size": 16, "window": 2, "log2_decay": -0.1}
    age_blocks(*rows, batch.flags | NEEDED, *channels[:2], **options)
    table, lens = random_table(1, 16)
    compact_block_table(table, lens, 16, torch.zeros_like(table), torch.zeros_like(lens))
    position = torch.zeros(2, *cache.shape[:3], dtype=torch.int32)
    scores = torch.zeros(2, *cache.shape[:3])
    start_tokens(slots, *reversed(rows[1:]), batch.flags, position, scores, scores.clone(), 3)


def main() -> None:
    compiled: dict[str, list[int]] = {}
    run = JITFunction.run

    def compile_only(kernel: JITFunction, *args, grid, warmup, **options):
        made = run(kernel, *args, grid=grid, warmup=True, **options)
        found = compiled.setdefault(f"{kernel.module}.{kernel.__name__}", [])
        if made.metadata.shared not in found:
            found.append(made.metadata.shared)

    triton.runtime.driver.set_active(Hopper())
    JITFunction.run = compile_only
    for head_size in (64, 256):
        mass(dtype=torch.bfloat16, heads=8, head_size=head_size)
    mass((0.0, -0.1), dtype=torch.bfloat16, heads=8, head_size=128)
    mass(heads=8, head_size=128, scales="head")
    mass(dtype=torch.float16, heads=8, head_size=80, soft_cap=3.0, block_size=32)
    packing()
    bookkeeping()
    modules = [
        importlib.import_module(f"{kernels.__name__}.{found.name}")
        for found in pkgutil.iter_modules(kernels.__path__)
    ]
    every = {
        f"{value.module}.{value.__name__}"
        for module in modules
        for value in vars(module).values()
        if isinstance(value, JITFunction) and value.__name__.endswith("_kernel")
    }
    print(json.dumps({"compiled": compiled, "every": sorted(every)}))


if __name__ == "__main__":
    main()
