"""Models some of whose layers have a sliding window: the others evict, and these stay vLLM's."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager

from vllm_plugins.attention.state import worker_state
from vllm_plugins.manager import EvictableManager

from . import oracle, token_oracle
from . import test_token_granularity as by_token
from .conftest import connector_of, make_tiny
from .stock_reference import answers as scored
from .test_oracle import select_h2o
from .test_prefix_caching import (
    BY_POSITION,
    ONE_CHUNK,
    answers,
    check_idle,
    generate,
    num_answered_as_alone,
    settings,
)
from .traffic import add, families, random_traffic
from .windowed import MODELS, WINDOW, make

TOKENS = np.random.default_rng(3).integers(0, 256, size=600).tolist()
TWO = [{"prompt_token_ids": TOKENS}, {"prompt_token_ids": TOKENS[::-1]}]
KEEP, BLOCK = 7, 32
BLOCK_BYTES = 2 * 2 * 32 * 32 * 4 * 2
"""Of ``mistral``: keys and values, KV heads, tokens, head size, bytes, layers of a group."""
CHUNKS = {"max_num_batched_tokens": 64, "long_prefill_token_threshold": 64}
SHARING = {**CHUNKS, "prefix_cache_retention_interval": BLOCK}
"""By default vLLM keeps a window's blocks where a prompt ends; thus, at every block."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models by name: folder and Transformers model, made when they are asked for."""
    made = {}

    def get(kind):
        if kind not in made:
            folder, model = tmp_path_factory.mktemp(kind), make(kind)
            model.save_pretrained(folder)
            made[kind] = str(folder), model
        return made[kind]

    return get


@pytest.fixture(scope="module")
def start(folders, engine_slot):
    """An engine over a model, by settings."""

    def get(kind, engine=None, **options):
        key = repr(("windows", kind, engine, options))
        return engine_slot.get(key, lambda: make_tiny(folders(kind)[0], engine, **options))

    return get


@pytest.fixture(scope="module", params=MODELS)
def kind(request):
    return request.param


def windows_of(llm):
    return [m for m in connector_of(llm)._managers if not isinstance(m, EvictableManager)]


def test_sparsity_0_equals_stock(kind, start, folders, engine_slot, tmp_path):
    """Greedy tokens and all log-probs, to the last bit."""
    prompts = [TOKENS[:500], TOKENS[100:433], TOKENS[200:210]]
    engine_slot.leave()  # two at a time are slow
    arguments = {
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 512,
        "long_prefill_token_threshold": 64,
        "kv_cache_memory_bytes": 64 << 20,
        "block_size": BLOCK,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "dtype": "float32",
    }
    request, answer = tmp_path / "request.json", tmp_path / "answer.json"
    request.write_text(json.dumps({"engine": arguments, "prompts": prompts, "max_tokens": 40}))
    script = Path(__file__).parent / "stock_reference.py"
    command = [sys.executable, str(script), folders(kind)[0], str(request), str(answer)]
    subprocess.run(command, check=True, capture_output=True)
    ours = scored(start(kind), prompts, 40, [{"kv_policy": "h2o", "kv_sparsity": 0.0}] * 3)
    assert ours == json.loads(answer.read_text())


def test_layers_without_a_window_evict(kind, start):
    """vLLM's groups are of one kind each, and nothing is gathered for those with a window."""
    llm = start(kind)
    evicting = [m for m in connector_of(llm)._managers if isinstance(m, EvictableManager)]
    expected = {"gemma2": (1, 1), "gemma3": (1, 5), "gpt_oss": (1, 1), "mistral": (2, 1)}
    assert (len(evicting), len(windows_of(llm))) == expected[kind]
    state = worker_state()
    assert state.kv_cache_groups == [manager.kv_cache_group_id for manager in evicting]
    full = {"gemma2": [1, 3], "gemma3": [5], "gpt_oss": [1, 3], "mistral": [1, 2, 4]}[kind]
    assert {int(name.split(".")[2]) for name in state.group_of} == set(full)
    assert state.kv_caches.keys() == state.group_of.keys()


def test_kept_tokens_equal_the_oracle(kind, start, folders):
    """The attention that decides is the layer's own: softly capped, with a sink in its softmax."""
    llm = start(kind)
    out, _ = llm.generate(TWO, by_token.settings("h2o"), use_tqdm=False)
    expected = token_oracle.run(
        folders(kind)[1],
        TOKENS,
        keep=KEEP,
        block_size=BLOCK,
        recent=0.2,
        choose=token_oracle.ranked((by_token.mean, 1.0)),
        chunk=64,
        slack=1,
    )
    record = out.kv_transfer_params["kv_eviction"]
    assert record["decisions"] == expected.num_decisions * (1 + (kind == "mistral")) > 0
    assert by_token.kept_tokens(record) == expected.kept
    ours = by_token.log_probs(out, TOKENS)
    np.testing.assert_allclose(ours, expected.log_likelihoods[: len(TOKENS) - 1], atol=1e-3)


def test_kept_blocks_equal_the_oracle(kind, start, folders):
    llm = start(kind)
    params = by_token.settings("h2o", kv_granularity="block")
    out, _ = llm.generate(TWO, params, use_tqdm=False)
    expected = oracle.run(
        folders(kind)[1],
        TOKENS,
        keep=KEEP,
        chunk=64,
        block_size=BLOCK,
        select=select_h2o,
        group_of=[0, 1, 0] if kind == "mistral" else None,
    )
    record = out.kv_transfer_params["kv_eviction"]
    assert record["trace"] == expected.decisions
    assert record["decisions"] == len(expected.decisions) > 5
    ours = by_token.log_probs(out, TOKENS)
    np.testing.assert_allclose(ours, expected.log_likelihoods[: len(TOKENS) - 1], atol=1e-3)


def test_windows_hold_what_vllm_holds(kind, start):
    """Whatever the other layers evict: at every step the blocks that the window has not passed."""
    llm = start(kind)
    connector, engine = connector_of(llm), llm.llm_engine
    for manager in windows_of(llm):
        assert isinstance(manager, SlidingWindowManager)
        assert type(manager).remove_skipped_blocks is SlidingWindowManager.remove_skipped_blocks
        cap = manager.kv_cache_spec.max_admission_blocks_per_request(512, 1024)
        assert (
            manager.max_admission_blocks_per_request == cap == -(-(WINDOW - 1 + 512) // BLOCK) + 1
        )
    held = []
    for sparsity in (0.0, 0.9):
        extra = {"kv_policy": "h2o", "kv_sparsity": sparsity, "kv_granularity": "token"}
        names = [
            add(llm, f"{i}", prompt["prompt_token_ids"], extra, 60) for i, prompt in enumerate(TWO)
        ]
        steps = []
        while engine.has_unfinished_requests():
            states = [connector.ledger.requests.get(name) for name in names]
            before = [state and state.request.num_computed_tokens for state in states]
            engine.step()
            for place, computed in enumerate(before):
                for manager in windows_of(llm):
                    if not (blocks := manager.req_to_blocks.get(names[place])):
                        continue
                    live = [i for i, block in enumerate(blocks) if not block.is_null]
                    passed = max(0, computed - WINDOW + 1) // BLOCK
                    assert live == list(range(passed, len(blocks)))
                    steps.append((place, manager.kv_cache_group_id, live))
        held.append(steps)
    assert held[0] == held[1]
    assert len(held[0]) > 100


@pytest.fixture(scope="module")
def prompts():
    """Prompts that share 400, 300, 200, 400, 64 and 33 tokens with the first one."""
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, size=400).tolist()
    lengths = ((400, 50), (300, 100), (200, 40), (400, 90), (64, 64), (33, 50))
    return [base[:shared] + rng.integers(0, 256, size=own).tolist() for shared, own in lengths]


def test_answers_do_not_depend_on_sharing(prompts, start):
    forms = [("dense", "block"), *BY_POSITION, ("tova", "token")]
    made = []
    for sharing in (False, True):
        llm = start("mistral", ONE_CHUNK, prefix_caching=sharing)
        for form in forms:
            together = generate(llm, prompts, settings(*form))
            alone = [generate(llm, [prompt], settings(*form))[0] for prompt in prompts]
            made.append((answers(together), answers(alone)))
            cached = sum(output.num_cached_tokens for output in together + alone)
            assert (cached > 500) == sharing, form
            assert llm.reset_prefix_cache()
    assert made[: len(forms)] == made[len(forms) :]


def test_a_repeated_prompt_is_found(prompts, start):
    """As vLLM keeps windows by default; where attention is gathered, before the last 32 tokens."""
    llm = start("mistral", ONE_CHUNK, prefix_caching=True)
    for prompt in prompts[:4]:
        assert llm.reset_prefix_cache()
        first, again = (generate(llm, [prompt], {"kv_policy": "dense"})[0] for _ in range(2))
        scored = generate(llm, [prompt], settings("h2o", "token"))[0]
        found = [output.num_cached_tokens for output in (first, again, scored)]
        assert found == [0, *((len(prompt) - own) // BLOCK * BLOCK for own in (1, 32))]
        assert answers([again]) == answers([first])


def test_what_saw_an_evicted_cache_is_not_shared(prompts, start):
    """Not by layers with a window either, whose tokens come from the layers before them."""
    llm = start("mistral", SHARING, prefix_caching=True)
    dense = {"kv_policy": "dense"}
    whole = answers(generate(llm, prompts[:1], dense))
    assert llm.reset_prefix_cache()
    evicting = generate(llm, prompts[:1], {**settings("streaming", "block"), "kv_sparsity": 0.9})
    assert evicting[0].kv_transfer_params["kv_eviction"]["first_eviction_tokens"] < 300
    cached = []
    for _ in range(2):
        outputs = generate(llm, prompts[:1], dense)
        cached.append(outputs[0].num_cached_tokens)
        assert answers(outputs) == whole
    assert 0 < cached[0] < 300 < cached[1]


def test_random_arrivals_with_shared_prefixes(start):
    """A pool too small, aborts, preemptions, every policy: blocks are conserved at every step, and
    who keeps all its cache answers as it does alone."""
    llm = start(
        "mistral", {**SHARING, "kv_cache_memory_bytes": 84 * BLOCK_BYTES}, prefix_caching=True
    )
    rng = np.random.default_rng(12)
    asked, make = families(rng, 256, 400, 100, 100)
    outputs = random_traffic(llm, rng, 80, make)
    check_idle(llm)
    records = [output.kv_transfer_params["kv_eviction"] for output in outputs.values()]
    assert sum(record["preemptions"] for record in records) > 0
    assert sum(record["blocks_evicted"] for record in records) > 100
    assert sum(record["cached_tokens"] for record in records) > 1000
    assert not any("policy_error" in record for record in records)
    assert num_answered_as_alone(llm, asked, outputs) > 10
