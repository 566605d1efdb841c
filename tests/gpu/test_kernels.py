"""The kernel cases compiled for a GPU, at the head sizes and block sizes that are used."""

import pytest
import torch

from tests.kernels.cases import MIXED, add, check_compaction, compare, expected_mass, make_batch
from vllm_plugins.kernels.block_scores import add_key_norms, age_blocks, start_blocks
from vllm_plugins.kernels.compact import compact_block_table

from .engines import NEEDS_GPU

pytestmark = NEEDS_GPU


def mass_of(batch, **options):
    mass = torch.zeros(len(batch.kv_cache), dtype=torch.int64, device="cuda")
    return add(batch, mass, **options)


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("seed", range(6))
def test_compaction(seed, block_size):
    check_compaction(compact_block_table, seed, block_size, "cuda")


# float32 is not a KV type here: its products would go through tf32.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
def test_mixed_batches(head_size, block_size, dtype):
    batch = make_batch(
        MIXED,
        device="cuda",
        dtype=dtype,
        heads=8,
        kv_heads=2,
        head_size=head_size,
        block_size=block_size,
    )
    compare(mass_of(batch), expected_mass(batch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (9, 3), (32, 1)])
def test_decode_rows(heads, kv_heads, head_size, dtype):
    rows = [(1, 40), (0, 0), (1, 16), (1, 3001)] + [(1, 500)] * 20
    batch = make_batch(
        rows,
        device="cuda",
        dtype=dtype,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        unscored=[2, 7],
    )
    compare(mass_of(batch, one_query=True), expected_mass(batch))


@pytest.mark.parametrize("scales", ["layer", "head"])
@pytest.mark.parametrize("head_size", [64, 80, 128, 256])
def test_a_quantised_cache(head_size, scales):
    """Scores by block, and norms of keys, of 8-bit numbers with scales."""
    shape = {"heads": 8, "kv_heads": 2, "head_size": head_size, "scales": scales}
    batch = make_batch(MIXED, device="cuda", **shape)
    compare(mass_of(batch), expected_mass(batch))
    batch = make_batch([(1, 40), (0, 0), (1, 16), (1, 3001)], device="cuda", **shape)
    compare(mass_of(batch, one_query=True), expected_mass(batch))
    norm = torch.zeros(len(batch.kv_cache), dtype=torch.int64, device="cuda")
    block = int(batch.block_table[0, 0])
    slots = torch.arange(block * 16, block * 16 + 16, device="cuda")
    add_key_norms(slots, batch.kv_cache, norm, batch.key_scale, batch.query_scale)
    both = batch.kv_cache.view(torch.uint8)[block].view(torch.float8_e4m3fn).double()
    keys, values = both.chunk(2, dim=-1)
    of_keys, of_values = (s.double().view(-1, 1) for s in (batch.key_scale, batch.query_scale))
    ratio = values.norm(dim=-1) * of_values / (keys.norm(dim=-1) * of_keys)
    made = float(norm[block]) / 2**30
    assert made == pytest.approx(float(ratio.sum()) / 16, rel=1e-4)
    assert int((norm != 0).sum()) == 1


@pytest.mark.parametrize(
    ("window", "decay", "decode_weight", "soft_cap"),
    [(32, 1.0, 1, 0.0), (None, 0.99, 8, 0.0), (5, 0.9, 1, 3.0)],
)
def test_options(window, decay, decode_weight, soft_cap):
    rows = [*MIXED, (300, 700)]
    batch = make_batch(
        rows, device="cuda", dtype=torch.bfloat16, head_size=64, soft_cap=soft_cap, seed=1
    )
    log2_decay = torch.tensor(decay).log2().item()
    mass = mass_of(batch, window=window, log2_decay=log2_decay, decode_weight=decode_weight)
    compare(mass, expected_mass(batch, window, decay, decode_weight))


def test_the_same_batch_gives_the_same_scores_to_the_last_bit():
    batch = make_batch(
        [(700, 900), (64, 2000)], device="cuda", dtype=torch.bfloat16, heads=32, kv_heads=8
    )
    first = mass_of(batch)
    assert all(torch.equal(mass_of(batch), first) for _ in range(20))


def test_block_scores():
    mass = torch.full((6,), 5, dtype=torch.int64, device="cuda")
    queries, norm = mass.clone(), mass.clone()
    slots = torch.tensor([16, 17, 47, 48, -1, -1, 81], device="cuda")
    start_blocks(slots, 16, mass, queries, norm)
    for scores in (mass, queries, norm):
        assert scores.tolist() == [5, 0, 5, 0, 5, 5]
    key = torch.randn(6, 3, 16, 80, device="cuda").to(torch.bfloat16)
    add_key_norms(slots, torch.cat((key, key), -1), norm)
    expected = torch.tensor([0, 2 * 3 / 16, 3 / 16, 3 / 16, 0, 3 / 16], dtype=torch.float64)
    untouched = torch.tensor([5, 0, 5, 0, 5, 5], dtype=torch.float64)
    torch.testing.assert_close(norm.double().cpu(), untouched + expected * 2**30, rtol=1e-6, atol=2)
    batch = make_batch([(3, 50)], device="cuda", dtype=torch.bfloat16)
    mass = torch.full((len(batch.kv_cache),), 2**30, dtype=torch.int64, device="cuda")
    age_blocks(
        batch.block_table,
        batch.seq_lens,
        batch.query_start_loc,
        batch.flags,
        mass,
        torch.zeros_like(mass),
        block_size=16,
        window=2**30,
        log2_decay=-1.0,
    )
    assert mass[batch.block_table[0, :4].long()].tolist() == [2**27] * 4
