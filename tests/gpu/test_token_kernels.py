"""The cases of token granularity compiled for a GPU: scores, choice, packing."""

import pytest
import torch

from tests.kernels.token_cases import (
    check_choice,
    check_key_difference,
    check_pack,
    check_pack_by_keys,
    check_pack_of_bytes,
    check_start,
    check_token_mass,
)

from .engines import NEEDS_GPU

pytestmark = NEEDS_GPU


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_size", [64, 80, 128, 256])
@pytest.mark.parametrize("block_size", [16, 32])
def test_token_mass(head_size, block_size, dtype):
    shape = {"heads": 8, "kv_heads": 2, "head_size": head_size, "block_size": block_size}
    check_token_mass("cuda", dtype=dtype, unscored=[2], **shape)
    check_token_mass("cuda", dtype=dtype, options={"decay": 0.9, "decode_weight": 4}, **shape)
    options = {"skip": 3, "stride": 8}
    check_token_mass("cuda", dtype=dtype, options=options, **shape)
    rows = [(1, 40), (0, 0), (1, 16), (1, 3001)] + [(1, 500)] * 20
    check_token_mass("cuda", dtype=dtype, rows=rows, one_query=True, **shape)
    several = {"one_query": True, "options": {"decode_weight": 8}, "programs": 64, **shape}
    check_token_mass("cuda", dtype=dtype, rows=rows, unscored=[2, *range(9, 24)], **several)


def test_tokens_start_afresh():
    check_start("cuda")


@pytest.mark.parametrize(
    ("policy", "parameters"),
    [("h2o", {}), ("cab", {"bridge_definition": "peak"}), ("streaming", {}), ("random", {})],
)
def test_packing(policy, parameters):
    check_pack(policy, parameters, "cuda")


@pytest.mark.parametrize("scales", ["layer", "head"])
@pytest.mark.parametrize("head_size", [64, 80, 128, 256])
def test_a_quantised_cache(head_size, scales):
    shape = {"heads": 8, "kv_heads": 2, "head_size": head_size, "scales": scales}
    check_token_mass("cuda", unscored=[2], **shape)
    rows = [(1, 40), (0, 0), (1, 16), (1, 3001)] + [(1, 500)] * 20
    check_token_mass("cuda", rows=rows, one_query=True, **shape)


@pytest.mark.parametrize(
    ("policy", "parameters"),
    [
        ("h2o", {}),
        ("h2o", {"value_weighted": True}),
        ("keydiff", {}),
        ("cab", {}),
    ],
)
def test_packing_a_quantised_cache(policy, parameters):
    check_pack_of_bytes(policy, parameters, "cuda")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("blocks", [(9, 6, 3), (29, 28, 12), (150, 40, 600)])
def test_the_fused_choice_is_that_of_torch(blocks, tied):
    for rankings in (
        [("score", 1.0)],
        [("score", 0.5), ("peak", 0.2)],
        [("position", 1.0)],
        [("given", 1.0)],
        [("score", 0.5), ("given", 0.2)],
    ):
        check_choice(rankings, "cuda", blocks=blocks, tied=tied)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("head_size", [64, 80, 128, 256])
@pytest.mark.parametrize("block_size", [16, 32])
def test_keys_unlike_the_mean_key(head_size, block_size, dtype):
    for blocks in ((9, 6, 3), (150, 40, 600)):
        check_key_difference(
            "cuda", blocks=blocks, head_size=head_size, block_size=block_size, dtype=dtype
        )


def test_keys_of_caches_that_no_vector_fits():
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        check_key_difference("cuda", head_size=128, dtype=dtype, apart=3)


@pytest.mark.parametrize(
    ("policy", "parameters"),
    [("keydiff", {}), ("cab", {})],
)
def test_packing_by_keys(policy, parameters):
    check_pack_by_keys(policy, parameters, "cuda")
