"""What rankings at token granularity are given, against the definitions, one token at a time."""

import numpy as np
import pytest
import torch

from vllm_plugins.attention import token_choice
from vllm_plugins.attention.token_choice import TokenCandidates
from vllm_plugins.policies import PolicyParameterError, get_policy

LENGTHS = [24, 9]
SHARING = ("h2o", "cab", "tova", "snapkv", "keydiff")
LAYERS, HEADS, WIDTH, SIZE = 3, 2, 24, 8


@pytest.fixture(params=[1 << 18, 30], ids=["at once", "head by head"])
def candidates(request, monkeypatch):
    """Two requests; the second one's candidates end early, and garbage lies behind them."""
    monkeypatch.setattr(token_choice, "MOST_VECTORS", request.param)
    rng = np.random.default_rng(0)
    shape = (len(LENGTHS), LAYERS, HEADS)
    positions = np.stack([rng.permutation(1000)[:WIDTH] for _ in range(int(np.prod(shape)))])
    arrays = {
        "position": torch.from_numpy(positions.reshape(*shape, WIDTH)).int(),
        "mass": torch.from_numpy(rng.random((*shape, WIDTH))).float(),
    }
    vectors = torch.from_numpy(rng.normal(size=(2, *shape, WIDTH, SIZE))).float()
    lengths = torch.tensor(LENGTHS)[:, None, None, None]
    made = TokenCandidates(
        arrays,
        "mean",
        lengths,
        torch.zeros_like(lengths),
        lengths,
        torch.zeros(LAYERS, HEADS, 1, dtype=torch.int64),
        lengths,
        lambda layer, heads: (vectors[0, :, layer, heads], vectors[1, :, layer, heads]),
    )
    return made, vectors.double()


def heads():
    return ((r, i, h) for r in range(len(LENGTHS)) for i in range(LAYERS) for h in range(HEADS))


def test_norms_are_those_of_keys_and_values(candidates):
    made, (keys, values) = candidates
    ratio = values.norm(dim=-1) / keys.norm(dim=-1)
    torch.testing.assert_close(made.key_norm.double(), ratio, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made.value_norm.double(), values.abs().sum(-1), rtol=1e-5, atol=0)


def test_key_difference_is_the_angle_to_the_mean_direction(candidates):
    made, (keys, _) = candidates
    for r, i, h in heads():
        own = keys[r, i, h, : LENGTHS[r]]
        unit = own / own.norm(dim=-1, keepdim=True)
        mean = unit.mean(0)
        expected = -(unit @ (mean / mean.norm()))
        ours = made.key_difference[r, i, h, : LENGTHS[r]].double()
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [1, 3, 5])
def test_pooling_is_over_neighbours_in_the_sequence(candidates, width):
    made, _ = candidates
    ours = made.pooled(made.mass, width)
    for r, i, h in heads():
        length = LENGTHS[r]
        order = made.positions[r, i, h, :length].argsort().tolist()
        for place, slot in enumerate(order):
            near = order[max(0, place - width // 2) : place + width // 2 + 1]
            expected = made.mass[r, i, h, near].double().mean()
            assert ours[r, i, h, slot].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("policy", "parameters", "granularity", "says"),
    [
        ("h2o", {"selection": "layer"}, "block", "token granularity only"),
        ("cab", {"value_weighted": True}, "block", "token granularity only"),
        ("tova", {}, "block", "no form at block"),
    ],
)
def test_what_a_policy_cannot_do_is_said(policy, parameters, granularity, says):
    known = get_policy(policy)
    with pytest.raises(PolicyParameterError, match=says):
        known.require(granularity, known.resolve(parameters))


@pytest.mark.parametrize(
    ("policy", "parameters", "says"),
    [
        ("snapkv", {"pool": 0}, "odd number"),
        ("snapkv", {"pool": 4}, "odd number"),
        ("snapkv", {"window": 0}, "window of policy snapkv is 0"),
        *((name, {"selection": "model"}, "use one of: head, layer, group") for name in SHARING),
    ],
)
def test_a_parameter_out_of_range_is_refused_whatever_the_granularity(policy, parameters, says):
    with pytest.raises(PolicyParameterError, match=says):
        get_policy(policy).resolve(parameters)
