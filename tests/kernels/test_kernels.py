"""Every Triton kernel in Triton's interpreter, against float64 references."""

import pytest
import torch

from vllm_plugins.kernels.attention_mass import Tile
from vllm_plugins.kernels.block_scores import add_key_norms, age_blocks, start_blocks
from vllm_plugins.kernels.compact import compact_block_table

from . import cases
from .cases import MIXED, ONE, check_compaction, compare, expected_mass, make_batch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs these cases")
SMALL = Tile(rows=16, keys=32, warps=1, stages=1)


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("seed", range(6))
def test_compaction(seed, block_size):
    check_compaction(compact_block_table, seed, block_size)


def test_compaction_of_a_warm_up_row_of_nulls():
    out_table, out_lens = torch.zeros(1, 4, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    lens = torch.tensor([1], dtype=torch.int32)
    compact_block_table(torch.zeros(1, 4, dtype=torch.int32), lens, 16, out_table, out_lens)
    assert out_lens.tolist() == [0]


def add(batch, mass, **options):
    cases.add(batch, mass, tile=SMALL, **options)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (7, 1)])
@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_chunk_rows(heads, kv_heads, block_size):
    batch = make_batch(MIXED, heads=heads, kv_heads=kv_heads, block_size=block_size)
    mass = torch.zeros(len(batch.kv_cache), dtype=torch.int64)
    add(batch, mass)
    compare(mass, expected_mass(batch))


@pytest.mark.parametrize(
    ("options", "decay", "soft_cap", "head_size"),
    [
        ({"window": 8}, 1.0, 0.0, 16),
        ({}, 0.9, 0.0, 16),
        ({"window": 5, "decode_weight": 4}, 0.9, 0.0, 16),
        ({}, 1.0, 3.0, 80),
        ({"skip": 1, "stride": 8}, 0.9, 0.0, 16),
        ({"window": 18, "skip": 3, "stride": 2}, 1.0, 0.0, 16),
    ],
)
def test_options_of_chunk_rows(options, decay, soft_cap, head_size):
    batch = make_batch(MIXED, soft_cap=soft_cap, head_size=head_size, seed=1)
    mass = torch.zeros(len(batch.kv_cache), dtype=torch.int64)
    log2_decay = torch.tensor(decay).log2().item()
    add(batch, mass, log2_decay=log2_decay, **options)
    compare(mass, expected_mass(batch, decay=decay, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("programs", [1, 1000])
def test_decode_rows(dtype, programs):
    rows = [(1, 40), (0, 0), (1, 16), (1, 301)]
    batch = make_batch(rows, dtype=dtype, heads=6, unscored=[2])
    mass = torch.zeros(len(batch.kv_cache), dtype=torch.int64)
    add(batch, mass, one_query=True, programs=programs)
    compare(mass, expected_mass(batch))
    add(batch, mass, one_query=True, decode_weight=8)
    compare(mass, 9 * expected_mass(batch))


def test_decode_rows_outside_the_range_are_left_alone():
    """Whatever the range's place among the rows that are dealt out together."""
    rows = [(1, 30 + row) for row in range(12)]
    everything = make_batch(rows)
    mass = torch.zeros(len(everything.kv_cache), dtype=torch.int64)
    add(everything, mass, rows=(2, 9), one_query=True, decode_weight=4)
    batch = make_batch(rows, unscored=[0, 1, 9, 10, 11])
    compare(mass, 4 * expected_mass(batch))


@pytest.mark.parametrize("scales", ["layer", "head"])
@pytest.mark.parametrize("soft_cap", [0.0, 3.0])
def test_a_quantised_cache(scales, soft_cap):
    """Queries and keys count what their scales say, a layer's or each head's own."""
    for rows, options in ((MIXED, {}), ([(1, 40), (0, 0), (1, 301)], {"one_query": True})):
        batch = make_batch(rows, scales=scales, soft_cap=soft_cap, heads=6, seed=2)
        mass = torch.zeros(len(batch.kv_cache), dtype=torch.int64)
        add(batch, mass, **options)
        compare(mass, expected_mass(batch))


def test_queries_of_16_bits_over_a_quantised_cache():
    """As FlashAttention 4 has them at a head size of 512: nothing is known of their scale."""
    batch = make_batch(MIXED, scales="head", heads=6)
    quantised = batch.query.float() * batch.query_scale.repeat_interleave(3)[:, None]
    batch.query, batch.query_scale = quantised.half(), None
    mass = torch.zeros(len(batch.kv_cache), dtype=torch.int64)
    add(batch, mass)
    compare(mass, expected_mass(batch))


def test_rows_outside_the_range_are_left_alone():
    batch = make_batch(MIXED, unscored=[0, 1, 2, 5, 6])
    mass = torch.zeros(len(batch.kv_cache), dtype=torch.int64)
    everything = make_batch(MIXED)
    add(everything, mass, rows=(3, 5))
    compare(mass, expected_mass(batch))


def test_blocks_start_afresh_with_their_first_token():
    channels = [torch.full((6,), 5, dtype=torch.int64) for _ in range(3)]
    slots = torch.tensor([16, 17, 47, 48, -1, -1, 81])
    start_blocks(slots, 16, *channels)
    for scores in channels:
        assert scores.tolist() == [5, 0, 5, 0, 5, 5]


def test_key_norms():
    torch.manual_seed(0)
    cache = torch.randn(4, 3, 16, 40)
    check_key_norms(cache, cache)


@pytest.mark.parametrize("scales", ["layer", "head"])
def test_key_norms_of_a_quantised_cache(scales):
    torch.manual_seed(0)
    cache = torch.randn(4, 3, 16, 40).to(torch.float8_e4m3fn)
    of_values, of_keys = cases.quantised(scales, 3)
    of_keys += 1.0
    keys, values = cache.float().chunk(2, dim=-1)
    seen = [n * scale.view(-1, 1, 1) for n, scale in ((keys, of_keys), (values, of_values))]
    check_key_norms(cache, torch.cat(seen, -1), of_keys, of_values)


def check_key_norms(cache, seen, *scales):
    norm = torch.zeros(4, dtype=torch.int64)
    add_key_norms(torch.tensor([16, 17, 3, 63, -1]), cache, norm, *scales)
    key, value = seen.double().chunk(2, dim=-1)
    ratio = (value.norm(dim=-1) / key.norm(dim=-1)).sum(1) / 16
    expected = torch.stack((ratio[0, 3], ratio[1, :2].sum(), 0 * ratio[2, 0], ratio[3, 15]))
    torch.testing.assert_close(norm.double() / ONE, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay", [1.0, 0.75])
def test_ageing(decay):
    batch = make_batch([(3, 50), (1, 20), (9, 40), (0, 0), (1, 30)], unscored=[1])
    batch.flags[2] = 1  # needed, but not scored in this step
    mass = torch.full((len(batch.kv_cache),), ONE, dtype=torch.int64)
    queries = torch.zeros_like(mass)
    log2_decay = torch.tensor(decay).log2().item()
    options = {"block_size": 16, "window": 2, "decode_weight": 8, "log2_decay": log2_decay}
    rows = (batch.block_table, batch.seq_lens, batch.query_start_loc, batch.flags)
    age_blocks(*rows, mass, queries, **options)
    first, third = batch.block_table[0, :4].long(), batch.block_table[2, :3].long()
    decoding = batch.block_table[4, :2].long()
    faded = torch.ones(len(mass), dtype=torch.float64)
    seen = torch.zeros(len(mass), dtype=torch.int64)
    if decay < 1.0:
        faded[first], faded[third], faded[decoding] = decay**3, decay**9, decay
    else:
        seen[first], seen[decoding] = 2, 8
    torch.testing.assert_close(mass.double() / ONE, faded, rtol=1e-6, atol=1e-6)
    assert torch.equal(queries, seen)
