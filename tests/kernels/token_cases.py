"""Cases of the token kernels and of packing, for Triton's interpreter and for a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_plugins.attention import packing
from vllm_plugins.attention.packing_cuda import CUDAPacker
from vllm_plugins.attention.quantised_cache import Scales
from vllm_plugins.attention.token_choice import Batch, TokenCandidates, choose, moves
from vllm_plugins.attention.token_scores import UNWRITTEN, TokenScores
from vllm_plugins.kernels import TOKENS_NEEDED, TOKENS_SCORED, WINDOW_SHIFT
from vllm_plugins.kernels import choose as fused
from vllm_plugins.kernels.attention_mass import PROGRAMS
from vllm_plugins.kernels.key_difference import key_difference
from vllm_plugins.kernels.pack import Caches
from vllm_plugins.kernels.token_mass import add_token_mass, start_tokens
from vllm_plugins.packs import Pack
from vllm_plugins.policies import (
    TOKEN_MASS,
    TOKEN_PEAK,
    TOKENS,
    Policy,
    TokenRule,
    by_peak,
    by_position,
    by_score,
    chance,
    get_policy,
    registry,
)

from .cases import MIXED, make_batch, sampled

ALL = frozenset({TOKENS, TOKEN_MASS, TOKEN_PEAK})


def expected_tokens(
    batch,
    old_mass,
    old_peak,
    *,
    window=None,
    windows=(),
    decay=1.0,
    decode_weight=1,
    skip=0,
    stride=1,
):
    """Float64 mass and peak ``[num_blocks, kv_heads, block_size]`` after a step."""
    mass, peak = old_mass.double().cpu().clone(), old_peak.double().cpu().clone()
    kv_heads, block_size = batch.kv_cache.shape[1:3]
    table, flags = batch.block_table.cpu(), batch.flags.cpu()
    for row, p in enumerate(batch.probabilities):
        heads, queries, length = p.shape
        if not flags[row] & TOKENS_SCORED or queries == 0:
            continue
        age = torch.arange(queries - 1, -1, -1, dtype=torch.float64)
        weight = decay**age
        own = windows[row] if windows else 0
        if own or window:
            weight[: max(0, queries - (own or window))] = 0.0
        elapsed = queries
        if queries == 1:
            weight, elapsed = weight * decode_weight, decode_weight
        elif not own:
            weight *= sampled(length - queries, length, skip, stride)
        if skip and (own or queries == 1):
            continue
        grouped = p.view(kv_heads, heads // kv_heads, queries, length)
        given = (grouped * weight[None, None, :, None]).sum((1, 2))
        highest = (grouped * (weight > 0)[None, None, :, None]).amax((1, 2))
        place = torch.arange(length)
        at = table[row, place // block_size].long(), slice(None), place % block_size
        older = 0.0 if 0 < own <= queries else decay**elapsed
        mass[at] = mass[at] * older + given.T
        peak[at] = torch.maximum(peak[at], highest.T)
    return mass, peak


def check_token_mass(
    device="cpu",
    *,
    dtype=torch.float32,
    tile=None,
    with_peak=True,
    one_query=False,
    rows=MIXED,
    unscored=(),
    options=None,
    programs=PROGRAMS,
    **shape,
):
    """One step over a mixed batch, on top of older scores."""
    options = options or {}
    batch = make_batch(rows, device=device, dtype=dtype, **shape)
    flags = [0 if row in unscored else TOKENS_NEEDED | TOKENS_SCORED for row in range(len(rows))]
    for row, own in enumerate(options.get("windows", ())):
        flags[row] |= own << WINDOW_SHIFT
    batch.flags.copy_(torch.tensor(flags))
    num_blocks, kv_heads, block_size, _ = batch.kv_cache.shape
    generator = torch.Generator().manual_seed(5)
    mass = torch.rand(num_blocks, kv_heads, block_size, generator=generator).to(device)
    peak = 0.3 * torch.rand(num_blocks, kv_heads, block_size, generator=generator).to(device)
    expected = expected_tokens(batch, mass, peak, **options)
    before = peak.clone()
    options = dict(options)
    options.pop("windows", None)
    log2_decay = float(np.log2(options.pop("decay", 1.0)))
    add_token_mass(
        batch.queries,
        mass,
        peak if with_peak else None,
        rows=(0, len(rows)),
        max_seq_len=batch.max_seq_len,
        one_query=one_query,
        log2_decay=log2_decay,
        tile=tile,
        programs=programs,
        **options,
    )
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(mass.double().cpu(), expected[0], **close)
    torch.testing.assert_close(
        peak.double().cpu(), expected[1] if with_peak else before.double().cpu(), **close
    )


def check_start(device="cpu"):
    """New tokens of the rows that choose by tokens get their places and no score; others stay."""
    scores = TokenScores(3, (9, 2, 16), ALL, torch.device(device))
    scores.mass.fill_(7.0)
    scores.peak.fill_(7.0)
    starts, lens = [0, 1, 1, 34, 35], [20, 0, 40, 5]
    slots = [5 * 16 + 3, *range(2 * 16 + 7, 2 * 16 + 40), 1 * 16 + 4]
    slots[6] = -1  # padding in the middle is left alone
    flags = [TOKENS_NEEDED, TOKENS_NEEDED, TOKENS_NEEDED | TOKENS_SCORED, 0]
    integers = [torch.tensor(x, dtype=torch.int32, device=device) for x in (starts, lens, flags)]
    start_tokens(
        torch.tensor(slots, device=device),
        *integers,
        scores.position,
        scores.mass,
        scores.peak,
        max_query_len=33,
    )
    expected = {5 * 16 + 3: 19} | {slot: 7 + i for i, slot in enumerate(slots[1:34]) if slot >= 0}
    for slot in range(9 * 16):
        at = (slice(None), slot // 16, slice(None), slot % 16)
        fresh = slot in expected
        assert (scores.position[at] == expected.get(slot, UNWRITTEN)).all(), slot
        assert (scores.mass[at] == (0.0 if fresh else 7.0)).all(), slot
        assert (scores.peak[at] == (0.0 if fresh else 7.0)).all(), slot


def random_state(seed, device, *, layers=3, kv_heads=2, block_size=16, head_size=8, num_blocks=40):
    """Caches and scores in which each token can be told by its key: it spells its position."""
    generator = torch.Generator().manual_seed(seed)
    scores = TokenScores(layers, (num_blocks, kv_heads, block_size), ALL, torch.device(device))
    scores.mass.copy_(torch.rand(scores.mass.shape, generator=generator))
    scores.peak.copy_(torch.rand(scores.peak.shape, generator=generator))
    caches = {
        f"layer.{i}": torch.zeros(num_blocks, kv_heads, block_size, 2 * head_size, device=device)
        for i in range(layers)
    }
    return scores, caches


def write_tokens(scores, caches, block_ids, positions):
    """``positions`` (layers, heads, tokens) lie in ``block_ids``; keys and values spell them."""
    _, heads, tokens = positions.shape
    block_size = scores.position.shape[-1]
    place = torch.arange(tokens)
    ids, slot = torch.tensor(block_ids)[place // block_size], place % block_size
    for layer, cache in enumerate(caches.values()):
        for head in range(heads):
            mine = positions[layer, head]
            scores.position[layer, ids, head, slot] = mine.int().to(cache.device)
            spelt = mine[:, None] + 1000.0 * layer + 10000.0 * head
            both = torch.cat([spelt.expand(-1, 8), -spelt.expand(-1, 8)], 1)
            cache[ids, head, slot] = both.to(cache)


def check_pack(policy, parameters, device="cpu", seed=0, scoring="mean", packer=CUDAPacker):
    """Packing three requests of unequal length at once, against sets worked out one by one."""
    scores, caches = random_state(seed, device)
    rng = np.random.default_rng(seed)
    pool = rng.permutation(39) + 1
    packs, expected, first = {}, {}, 0
    for name, (blocks, kept, budget, now) in {
        "a": (9, 4, 6, 300),
        "b": (6, 5, 7, 2000),
        "c": (3, 1, 2, 64),
    }.items():
        ids = pool[first : first + blocks].tolist()
        first += blocks
        positions = torch.stack(
            [
                torch.stack(
                    [
                        torch.from_numpy(
                            np.concatenate(
                                (np.arange(6), 6 + rng.permutation(now - 6 - 16)[: blocks * 16 - 6])
                            )
                        )
                        for _ in range(2)
                    ]
                )
                for _ in range(3)
            ]
        )
        write_tokens(scores, caches, ids, positions)
        packs[name] = [
            Pack(0, ids, kept, budget, now, 11, policy, get_policy(policy).resolve(parameters))
        ]
        expected[name] = wanted(scores, packs[name][0], parameters, policy, scoring)
    before = {name: array.clone() for name, array in scores.arrays().items()}
    made = packer(
        kv_caches=caches, groups=[list(caches)], tokens=scores, scoring=scoring, sink_tokens=4
    )
    assert made.pack(packs) == {}
    for name, (pack,) in packs.items():
        check_request(scores, caches, before, pack, expected[name])


def check_pack_of_bytes(policy, parameters, device="cpu", per="head"):
    """Packing a quantised cache does what packing the numbers does that it stands for."""
    scores, caches = random_state(2, device)
    twin, _ = random_state(2, device)
    generator = torch.Generator().manual_seed(3)
    places = torch.stack([torch.randperm(400, generator=generator)[:272] for _ in range(6)])
    ids = (torch.randperm(39, generator=generator) + 1).tolist()[:17]
    packs = {}
    for name, own in (("a", ids[:9]), ("b", ids[9:])):
        args = get_policy(policy).resolve(parameters)
        packs[name] = [Pack(0, own, 4, 6, 400, 11, policy, args)]
    bytewise, plain, scales = {}, {}, {}
    for layer, (name, cache) in enumerate(caches.items()):
        for place, block in enumerate(ids):
            at = places.view(3, 2, -1, 16)[layer, :, place].int()
            scores.position[layer, block] = twin.position[layer, block] = at.to(device)
        drawn = torch.randn(cache.shape, generator=generator).to(torch.float8_e4m3fn).to(device)
        key, value = (
            0.5 + torch.rand(2 if per == "head" else 1, generator=generator) for _ in "kv"
        )
        scales[name] = Scales(key.to(device), value.to(device), None)
        bytewise[name] = drawn.view(torch.uint8)
        keys, values = drawn.float().chunk(2, dim=-1)
        plain[name] = torch.cat(
            [
                part * scale.to(device).view(-1, 1, 1)
                for part, scale in ((keys, key), (values, value))
            ],
            -1,
        )
    options = {"groups": [list(caches)], "scoring": "mean", "sink_tokens": 4}
    packer = CUDAPacker(kv_caches=bytewise, tokens=scores, scales=scales, **options)
    before = scores.position.clone()
    assert packer.pack(packs) == {}
    assert CUDAPacker(kv_caches=plain, tokens=twin, **options).pack(packs) == {}
    assert not torch.equal(scores.position, before)
    for mine, theirs in zip(scores.arrays().values(), twin.arrays().values(), strict=True):
        assert torch.equal(mine, theirs)
    for layer, (name, cache) in enumerate(bytewise.items()):
        for block in [block for (pack,) in packs.values() for block in pack.block_ids]:
            keys, values = cache[block].view(torch.float8_e4m3fn).float().chunk(2, dim=-1)
            scaled = [
                part * scale.view(-1, 1, 1)
                for part, scale in ((keys, scales[name].key), (values, scales[name].value))
            ]
            assert torch.equal(torch.cat(scaled, -1), plain[name][block]), layer


def check_request(scores, caches, before, pack, expected):
    """The region holds the expected tokens of each head, with their keys, values and scores."""
    region = pack.block_ids[: pack.num_kept_blocks]
    for layer, cache in enumerate(caches.values()):
        for head in range(2):
            at = (layer, pack.block_ids, head)
            old = {
                int(p): (float(m), float(k))
                for p, m, k in zip(
                    before["position"][at].flatten(),
                    before["mass"][at].flatten(),
                    before["peak"][at].flatten(),
                    strict=True,
                )
            }
            held = scores.position[layer, region, head].flatten().cpu()
            assert sorted(held.tolist()) == expected[layer][head]
            spelt = held + 1000.0 * layer + 10000.0 * head
            tokens = cache[region, head].flatten(0, 1).cpu()
            assert torch.equal(tokens[:, :8], spelt[:, None].expand(-1, 8))
            assert torch.equal(tokens[:, 8:], -spelt[:, None].expand(-1, 8))
            for position, mass, peak in zip(
                held.tolist(),
                scores.mass[layer, region, head].flatten().tolist(),
                scores.peak[layer, region, head].flatten().tolist(),
                strict=True,
            ):
                assert (mass, peak) == old[position]


def wanted(scores, pack, parameters, policy, scoring):
    """Positions that each head should keep, sorted; by the definitions, one head at a time."""
    layers, _, heads, block_size = scores.position.shape
    room, budget = pack.num_kept_blocks * block_size, pack.budget_blocks * block_size
    chosen = []
    for layer in range(layers):
        chosen.append([])
        for head in range(heads):
            at = (layer, pack.block_ids, head)
            tokens = list(
                zip(
                    *(
                        a[at].flatten().tolist()
                        for a in (scores.position, scores.mass, scores.peak)
                    ),
                    strict=True,
                )
            )
            score = {
                p: m / max(1, pack.num_tokens - p) if scoring == "mean" else m for p, m, _ in tokens
            }
            mass, peak = {p: m for p, m, _ in tokens}, {p: k for p, _, k in tokens}
            definition = parameters["bridge_definition"] if policy == "cab" else "peak"
            bridge = {"peak": peak, "mass": mass}[definition]
            drawn = {p: chance(p, pack.seed, layer * heads + head) for p in score}
            place = {p: p for p in score}
            orders = {
                "h2o": [(score, 1.0)],
                "cab": [(score, 0.5), (bridge, 0.2)],
                "streaming": [(place, 1.0)],
                "random": [(drawn, 1.0)],
            }[policy]
            later = [round(budget * share) for _, share in orders[1:]]
            left, keep = set(score), {p for p in score if p < 4}
            counts = [room - sum(later) - len(keep), *later]
            left -= keep
            for (order, _), count in zip(orders, counts, strict=True):
                best = sorted(left, key=lambda p: (np.float32(order[p]), p), reverse=True)[:count]
                keep |= set(best)
                left -= set(best)
            chosen[-1].append(sorted(keep))
    return chosen


def check_choice(rankings, device="cpu", *, blocks=(9, 6, 3), tied=False, scoring="mean", seed=1):
    """The kernel that chooses, and the choice in torch, agree to the bit, ties included.

    ``rankings``: (name, share of the budget) each.
    """
    scores, _ = random_state(seed, device, num_blocks=sum(blocks) + 1)
    if tied:
        scores.mass.copy_((scores.mass * 4).floor())
        scores.peak.copy_((scores.peak * 3).floor())
    generator = torch.Generator().manual_seed(seed)
    places = torch.stack(
        [
            torch.randperm(scores.position[0].numel() // 2, generator=generator)
            for _ in range(scores.position.shape[0] * 2)
        ]
    )
    scores.position.copy_(places.view(3, 2, -1, 16).transpose(1, 2))
    pool = (torch.randperm(sum(blocks), generator=generator) + 1).tolist()
    packs, first = [], 0
    for count in blocks:
        packs.append(
            Pack(
                0,
                pool[first : first + count],
                max(1, count // 2),
                count // 2 + 2,
                10**4,
                seed,
                "none",
                {},
                first_query=200 * len(packs),
            )
        )
        first += count
    width = max(blocks) + max(blocks) % 2  # ``Batch.of`` pads
    given = torch.rand(len(blocks), 3, 2, 16 * width, generator=generator).to(device) - 0.5
    if tied:
        given = (given * 5).floor()
    given[0, 0, 0, 5] = float("nan")
    functions = {
        "score": by_score,
        "peak": by_peak,
        "position": by_position,
        "given": lambda tokens, left: given,
    }
    rule = TokenRule(recent=0.1, ranked=tuple((functions[n], share) for n, share in rankings))
    batch = Batch.of(packs, rule, 16, 4, torch.device(device))
    every = slice(0, 3)
    candidates = TokenCandidates(
        scores.gather(batch.block_ids, every),
        scoring,
        batch.num_tokens,
        batch.first_query,
        batch.seeds,
        torch.zeros(3, 2, 1, dtype=torch.int64, device=device),
        batch.num_candidates,
        lambda layer, heads: None,
    )
    kept = choose(rule, candidates, batch, 4, check="given" not in dict(rankings))
    source, target, number = moves(kept, batch.num_kept, batch.most_moves)
    kinds = {
        "score": fused.MEAN if scoring == "mean" else fused.MASS,
        "peak": fused.PEAK,
        "position": fused.POSITION,
        "given": fused.GIVEN,
    }
    made = fused.choose_tokens(
        batch.block_ids,
        batch.numbers,
        scores.arrays(),
        tuple(kinds[n] for n, _ in rankings),
        sink_tokens=4,
        most_candidates=batch.most_candidates,
        most_moves=batch.most_moves,
        given=given if "given" in dict(rankings) else None,
    )
    assert torch.equal(made[2], number)
    real = torch.arange(batch.most_moves, device=device) < number[..., None]
    assert torch.equal(made[0] * real, source * real)
    assert torch.equal(made[1] * real, target * real)
    assert int(number.sum()) > 0


def check_key_difference(
    device="cpu", *, blocks=(9, 6, 3), head_size=8, block_size=16, dtype=torch.float32, apart=0
):
    """Against float64, one head at a time; and a request's ranks are those it has alone. ``apart``:
    elements by which the second and third layer's caches lie beside a vector's place."""
    generator = torch.Generator().manual_seed(4)
    num_blocks, heads = sum(blocks) + 1, 2
    caches = []
    for _ in range(3):
        drawn = torch.randn(num_blocks, heads, block_size, 2 * head_size, generator=generator)
        drawn += torch.randn(heads, 1, 2 * head_size, generator=generator)  # a mean direction
        drawn[1, 0, 3, :head_size] = 0.0  # no direction: neither like the mean nor unlike it
        drawn[:, :, :, head_size:] *= 100  # values do not count
        drawn = drawn.to(device, dtype)
        room = torch.empty(drawn.numel() + apart, dtype=dtype, device=device)
        caches.append(room[apart if caches else 0 :][: drawn.numel()].view(drawn.shape))
        caches[-1].copy_(drawn)
    pool = (torch.randperm(sum(blocks), generator=generator) + 1).split(list(blocks))
    ids = torch.zeros(len(blocks), max(blocks), dtype=torch.int64)
    for row, own in enumerate(pool):
        ids[row, : len(own)] = own
    numbers = torch.tensor([[n * block_size, 7] for n in blocks])
    layers = slice(1, 3)
    addressed = Caches.of(caches)
    assert addressed.aligned == (1 if apart else 16)
    every = {"caches": addressed, "layers": layers}
    made = key_difference(
        block_ids=ids.to(device),
        numbers=numbers.to(device),
        most_candidates=max(blocks) * block_size,
        **every,
    )
    assert made.shape == (len(blocks), 2, heads, max(blocks) * block_size)
    for row, own in enumerate(pool):
        tokens = len(own) * block_size
        alone = key_difference(
            block_ids=own[None].to(device),
            numbers=numbers[row : row + 1].to(device),
            most_candidates=tokens,
            **every,
        )
        assert torch.equal(made[row, :, :, :tokens], alone[0])
        for layer, cache in enumerate(caches[layers]):
            keys = cache.double()[own.to(device)].transpose(0, 1).flatten(1, 2)[..., :head_size]
            unit = torch.nn.functional.normalize(keys, dim=-1)
            mean = torch.nn.functional.normalize(unit.mean(1, keepdim=True), dim=-1)
            expected = -(unit * mean).sum(-1)
            torch.testing.assert_close(alone[0, layer].double(), expected, rtol=1e-5, atol=1e-6)


def check_pack_by_keys(policy, parameters, device="cpu", packer=CUDAPacker):
    """What is packed with a launch for the keys is what is packed with torch, and what is packed
    layer by layer; in groups of 2 and 1 layers, with a key that holds NaN."""

    class Torch(packer):
        def pack_fused(self, rule, batch, group):
            return False

    class Fused(packer):
        def vectors(self, *args):
            raise AssertionError("torch ranked")

    packs = {}
    pool = (torch.randperm(39, generator=torch.Generator().manual_seed(1)) + 1).tolist()
    args = get_policy(policy).resolve(parameters)
    packs["a"] = [
        Pack(0, pool[:17], 6, 9, 700, 11, policy, args),
        Pack(1, pool[26:35], 4, 6, 700, 11, policy, args),
    ]
    packs["b"] = [Pack(0, pool[17:26], 4, 6, 500, 12, policy, args)]
    kept = []
    for kind, most in ((Fused, None), (Fused, 1), (Torch, None)):
        scores, caches = random_state(6, device)
        generator = torch.Generator().manual_seed(7)
        places = torch.stack([torch.randperm(640, generator=generator) for _ in range(6)])
        scores.position.copy_(places.view(3, 2, 40, 16).transpose(1, 2))
        for cache in caches.values():
            cache.copy_(torch.randn(cache.shape, generator=generator) + 0.5)
        names = list(caches)
        caches[names[1]][pool[3], 1, 5, 2] = float("nan")
        options = {"groups": [names[:2], names[2:]], "scoring": "mean", "sink_tokens": 4}
        made = kind(kv_caches=caches, tokens=scores, **options)
        before = scores.position.clone()
        with pytest.MonkeyPatch.context() as patch:
            if most:
                patch.setattr(packing, "MOST_CANDIDATES", most)
            assert made.pack(packs) == {}
        assert not torch.equal(scores.position, before)
        kept.append([*scores.arrays().values(), *(c.nan_to_num() for c in caches.values())])
    for others in kept[1:]:
        for mine, theirs in zip(kept[0], others, strict=True):
            assert torch.equal(mine, theirs)


def check_positions_alike(device="cpu"):
    """Slots that nobody wrote: positions and ranks are all equal, and still nothing overflows."""
    scores, _ = random_state(1, device)
    scores.mass.zero_()
    pack = Pack(0, list(range(1, 9)), 6, 8, 1000, 11, "h2o", get_policy("h2o").resolve())
    rule = get_policy("h2o").tokens(pack.policy_args)
    batch = Batch.of([pack], rule, 16, 4, torch.device(device))
    source, target, count = fused.choose_tokens(
        batch.block_ids,
        batch.numbers,
        scores.arrays(),
        (fused.MASS,),
        sink_tokens=4,
        most_candidates=batch.most_candidates,
        most_moves=batch.most_moves,
    )
    assert source.shape[-1] == target.shape[-1] == 32
    assert (count <= 32).all()


def check_isolation(device="cpu"):
    """A ranking that fails for one request leaves its neighbour's pack as it would be alone."""

    def fails_for_many_tokens(tokens, left):
        if (tokens.num_tokens > 1000).any():
            raise RuntimeError("out of ideas")
        return tokens.mass

    rule = TokenRule(recent=0.2, ranked=((fails_for_many_tokens, 1.0),), needs=ALL - {TOKENS})
    policy = Policy(name="fails", tokens=lambda parameters: rule)
    scores, caches = random_state(0, device)
    for first, blocks in ((1, 6), (10, 8)):
        positions = torch.arange(blocks * 16).expand(3, 2, -1)
        write_tokens(scores, caches, list(range(first, first + blocks)), positions)
    packs = {
        "good": [Pack(0, list(range(1, 7)), 2, 3, 500, 1, "fails", {})],
        "bad": [Pack(0, list(range(10, 18)), 2, 3, 2000, 1, "fails", {})],
    }
    mass = scores.mass[:, 1:7].transpose(1, 2).flatten(2).clone()
    made = CUDAPacker(
        kv_caches=caches, groups=[list(caches)], tokens=scores, scoring="mean", sink_tokens=4
    )
    registry._BUILT_IN["fails"] = policy
    registry.get_policy.cache_clear()
    try:
        assert made.pack(packs) == {"bad": "RuntimeError: out of ideas"}
    finally:
        del registry._BUILT_IN["fails"]
        registry.get_policy.cache_clear()
    kept = scores.position[:, 1:3].transpose(1, 2).flatten(2).sort(-1).values
    mass[..., :4] = float("inf")
    expected = mass.topk(32, dim=-1).indices.sort(-1).values
    assert torch.equal(kept.long(), expected)
    recent = scores.position[:, 10:12].transpose(1, 2).flatten(2).sort(-1).values
    assert recent[0, 0].tolist() == [0, 1, 2, 3, *range(100, 128)]
