"""The chunk that ``kv-eviction serve`` chooses where contexts have to fit by their budget."""

import json

import pytest

from harness.resources.chunk import choose_chunk, peak_blocks
from harness.resources.pool_size import pool_blocks
from vllm_plugins.config import EvictionConfig

from .test_serve_flags import LLAMA, printed, value

SERVER = {"policy": "h2o", "sparsity": 0.9, "request_budgets": "server"}
CONFIG = EvictionConfig.parse(SERVER)


def choose(length, pool=None, steps=2, default=8192, **options):
    return choose_chunk(
        CONFIG,
        length,
        32,
        num_steps_in_flight=steps,
        default=default,
        pool_blocks=pool,
        **options,
    )


@pytest.mark.parametrize(
    ("length", "steps", "chunk"),
    [
        (8192, 2, 512),  # a budget of 832
        (32768, 2, 1024),  # 3,296, of which each chunk may take 1,648
        (32768, 1, 2048),
        (131072, 2, 4096),
        (1_000_000, 2, 8192),  # vLLM's default
    ],
)
def test_the_chunks_in_flight_take_no_more_than_the_budget(length, steps, chunk):
    assert choose(length, steps=steps) == chunk
    if chunk > 512:
        assert peak_blocks(CONFIG, length, 32, steps * chunk) <= 2 * length * 0.1 / 32 + 3


def test_a_step_has_a_token_for_each_decode():
    assert choose(8192, least=1024) == 1024


def test_a_small_pool_asks_for_a_smaller_chunk():
    """Of 60 blocks the budget takes 26, slack and a begun one 2: 32 are left for two chunks."""
    assert choose(8192, pool=60) == 512
    assert choose(8192, pool=59) == 256
    assert choose(8192, pool=59, floor=300) == 512
    assert choose(8192, pool=10) == 64


def test_a_pool_that_holds_many_peaks_keeps_vllms_chunk():
    peak = peak_blocks(CONFIG, 131072, 32, 2 * 8192)
    assert choose(131072, pool=16 * peak) == 8192
    assert choose(131072, pool=16 * peak - 1) == 4096


def test_blocks_of_a_pool_follow_from_the_models_shape():
    """A token takes 256 bytes of keys and values for each of 4 layers and 2 KV heads, and 12 of
    scores; of a server that never sums attention 4."""
    facts = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    facts["hidden_size"] = 128
    of = {"dtype_bytes": 4, "ranks": 1}
    streaming = EvictionConfig.parse({"policy": "streaming", "request_policies": []})
    assert pool_blocks(64 * 65536, facts, CONFIG, 32, **of) == 60
    assert pool_blocks(64 * 65536, {**facts, "head_dim": 64}, CONFIG, 32, **of) == 61 // 2
    assert pool_blocks(64 * 65536, facts, CONFIG, 32, dtype_bytes=4, ranks=2) == 121
    assert pool_blocks(64 * 65536, facts, streaming, 32, **of) == 62
    # 64 bytes of keys and values, and the same 12.
    assert pool_blocks(64 * 65536, facts, CONFIG, 32, dtype_bytes=1, ranks=1) == 214
    assert pool_blocks(64 * 65536, {}, CONFIG, 32, **of) is None


@pytest.fixture
def model(tmp_path):
    """Without weights; contexts of 16,384 tokens."""
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128}
    config = {**LLAMA, **shape, "max_position_embeddings": 16384, "torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


BASE = ("--policy", "h2o", "--sparsity", "0.9", "--request-budgets", "server")
POOL = ("--kv-cache-memory-bytes", str(512 * 65536))


def test_serve_chooses_a_chunk_by_the_budget_and_says_so(model, capsys):
    command, told = printed(capsys, model, *BASE, *POOL)
    assert value(command, "--max-num-batched-tokens") == "1024"
    (line,) = [line for line in told.splitlines() if "the chunk is" in line]
    assert "chosen by the budget: a request of 16,384 tokens, whose budget is 1,664" in line
    assert "holds up to 2,752 tokens" in line
    assert "vLLM's default of 2,048 would make that 3,776 tokens" in line
    assert "the pool holds about 15,616" in line


def test_a_shorter_context_or_a_smaller_pool_makes_it_smaller(model, capsys):
    command, _ = printed(capsys, model, *BASE, *POOL, "--max-model-len", "8k")
    assert value(command, "--max-num-batched-tokens") == "512"
    small = ("--kv-cache-memory-bytes", str(66 * 65536))
    command, _ = printed(capsys, model, *BASE, *small)
    assert value(command, "--max-num-batched-tokens") == "256"


def test_an_explicit_chunk_is_kept_and_told_where_it_is_large(model, capsys):
    command, told = printed(capsys, model, *BASE, *POOL, "--max-num-batched-tokens", "8192")
    assert command.count("--max-num-batched-tokens") == 1
    assert value(command, "--max-num-batched-tokens") == "8192"
    assert "the chunk of 8,192 tokens is large" in told
    assert "with --max-num-batched-tokens 1024 it holds 2,752 tokens" in told
    _, told = printed(capsys, model, *BASE, *POOL, "--max-num-batched-tokens", "512")
    assert "the chunk" not in told


def test_a_model_of_unknown_length_keeps_vllms_chunk(capsys):
    """Only its name is known, and nothing is fetched to print a command."""
    command, told = printed(capsys, "nobody/has-it", *BASE, *POOL)
    assert "--max-num-batched-tokens" not in command
    assert "the model's longest context is not known here; give --max-model-len" in told
    command, _ = printed(capsys, "nobody/has-it", *BASE, *POOL, "--max-model-len", "16K")
    assert value(command, "--max-num-batched-tokens") == "1024"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--policy", "h2o", "--sparsity", "0.9"), None),
        ((*BASE, "--score-chunk", "64"), None),
        ((*BASE, "--no-enable-chunked-prefill"), "computes a prompt in one step"),
        ((*BASE, "--kv-cache-memory-bytes", "64G"), "vLLM's default of 2,048 tokens"),
    ],
)
def test_elsewhere_the_chunk_is_vllms_or_the_users(flags, sentence, model, capsys):
    command, told = printed(capsys, model, *POOL, *flags)
    assert command.count("--max-num-batched-tokens") == ("--score-chunk" in flags)
    assert "chosen by the budget" not in told
    assert sentence is None or sentence in told
