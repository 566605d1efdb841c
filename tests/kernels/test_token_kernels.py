"""Kernels of token granularity and packing, in Triton's interpreter, against references."""

import pytest
import torch

from vllm_plugins.kernels.attention_mass import Tile

from .cases import MIXED
from .token_cases import (
    check_choice,
    check_isolation,
    check_key_difference,
    check_pack,
    check_pack_by_keys,
    check_pack_of_bytes,
    check_positions_alike,
    check_start,
    check_token_mass,
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs these cases")
SMALL = Tile(rows=16, keys=32, warps=1, stages=1)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (7, 1)])
@pytest.mark.parametrize("block_size", [16, 32])
def test_chunks_and_decodes(heads, kv_heads, block_size):
    check_token_mass(
        tile=SMALL, heads=heads, kv_heads=kv_heads, block_size=block_size, unscored=[2]
    )


@pytest.mark.parametrize(
    "options",
    [
        {"window": 8},
        {"decay": 0.9},
        {"window": 5, "decay": 0.9, "decode_weight": 4},
        {"skip": 1, "stride": 4},
        {"skip": 5, "stride": 8},
        {"skip": 2, "stride": 16, "window": 20, "decode_weight": 4},
    ],
)
def test_options(options):
    check_token_mass(tile=SMALL, options=options)


@pytest.mark.parametrize(
    "options", [{}, {"window": 3, "skip": 1, "stride": 2}, {"decay": 0.9, "decode_weight": 4}]
)
def test_windows_of_single_requests(options):
    """One that looks at its last query, at its last 32, at all; and more than a chunk has."""
    windows = [(0, 1, 32, 10_000)[row % 4] for row in range(len(MIXED))]
    check_token_mass(tile=SMALL, options={"windows": windows, **options})


def test_windows_of_decodes():
    rows = [(1, 40), (1, 16), (1, 301), (1, 5)]
    check_token_mass(
        rows=rows, one_query=True, options={"windows": [1, 32, 0, 1], "decode_weight": 8}
    )


@pytest.mark.parametrize("scales", ["layer", "head"])
def test_a_quantised_cache(scales):
    check_token_mass(tile=SMALL, scales=scales, heads=6, unscored=[2])
    rows = [(1, 40), (0, 0), (1, 301)]
    check_token_mass(rows=rows, one_query=True, scales=scales, heads=6)


@pytest.mark.parametrize("per", ["layer", "head"])
@pytest.mark.parametrize(
    ("policy", "parameters"),
    [
        ("h2o", {}),
        ("h2o", {"value_weighted": True}),
        ("h2o", {"value_weighted": True, "selection": "group"}),
        ("key_norm", {}),
        ("keydiff", {}),
        ("cab", {}),
    ],
)
def test_packing_a_quantised_cache(policy, parameters, per):
    check_pack_of_bytes(policy, parameters, per=per)


def test_without_peak():
    check_token_mass(tile=SMALL, with_peak=False)


@pytest.mark.parametrize("programs", [1, 1000])
def test_decodes_alone(programs):
    rows = [(1, 40), (0, 0), (1, 16), (1, 301)]
    check_token_mass(
        rows=rows,
        one_query=True,
        heads=6,
        unscored=[2],
        options={"decode_weight": 8},
        programs=programs,
    )


@pytest.mark.parametrize("programs", [1, 40, 1000])
@pytest.mark.parametrize("scored", [[5, 6, 7, 13], [63, 64], [129], range(130), []])
def test_decodes_dealt_out(scored, programs):
    """Some rows of a deal, rows of neighbouring deals, all, or none."""
    rows = [(1, 20 + 37 * row % 200) for row in range(130)]
    check_token_mass(
        rows=rows,
        one_query=True,
        unscored=set(range(130)) - set(scored),
        options={"decode_weight": 8},
        programs=programs,
    )


def test_tokens_start_afresh():
    check_start()


@pytest.mark.parametrize(
    ("policy", "parameters"),
    [
        ("h2o", {}),
        ("cab", {"bridge_definition": "peak"}),
        ("cab", {"bridge_definition": "mass"}),
        ("streaming", {}),
        ("random", {}),
    ],
)
def test_packing(policy, parameters):
    check_pack(policy, parameters)


def test_packing_by_sums():
    check_pack("h2o", {}, seed=3, scoring="sum")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "rankings",
    [
        [("score", 1.0)],
        [("position", 1.0)],
        [("score", 0.5), ("peak", 0.2)],
        [("peak", 0.5), ("score", 0.3)],
        [("score", 0.5), ("peak", 0.0)],
        [("score", 0.0), ("position", 1.0)],
        [("given", 1.0)],
        [("score", 0.5), ("given", 0.2)],
    ],
)
def test_the_fused_choice_is_that_of_torch(rankings, tied):
    check_choice(rankings, tied=tied)
    check_choice(rankings, tied=tied, scoring="sum")


def test_a_choice_among_more_tokens_than_a_tile():
    check_choice([("score", 0.5), ("peak", 0.2)], blocks=(150, 40), tied=True)


@pytest.mark.parametrize("head_size", [8, 80])
@pytest.mark.parametrize("block_size", [16, 32])
def test_keys_unlike_the_mean_key(head_size, block_size):
    check_key_difference(head_size=head_size, block_size=block_size)


@pytest.mark.parametrize(
    ("policy", "parameters"),
    [("keydiff", {}), ("cab", {})],
)
def test_packing_by_keys(policy, parameters):
    check_pack_by_keys(policy, parameters)


def test_no_list_is_written_beyond_its_end():
    check_positions_alike()


def test_one_requests_trouble_is_not_its_neighbours():
    check_isolation()
