"""What cannot work is refused before an engine starts: one sentence, exit status 2."""

import json
import subprocess
import sys

import pytest

from harness.cli import main

from .conftest import make_tiny

MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 256,
    "max_position_embeddings": 2048,
    "sliding_window": 256,
    "dtype": "float32",
}
HYBRID = {**MISTRAL, "layer_types": ["sliding_attention", "full_attention"] * 2}
LLAMA4 = {
    "architectures": ["Llama4ForCausalLM"],
    "model_type": "llama4_text",
    "hidden_size": 128,
    "intermediate_size": 256,
    "intermediate_size_mlp": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 256,
    "max_position_embeddings": 2048,
    "attention_chunk_size": 256,
    "num_local_experts": 2,
    "dtype": "float32",
}
DEEPSEEK = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 256,
    "max_position_embeddings": 2048,
    "dtype": "float32",
}
MULTI = {"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config": {}}


@pytest.fixture
def model(tmp_path):
    def make(config):
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    return make


def check(model, engine=None, **settings):
    from vllm import EngineArgs

    from vllm_plugins import eviction_engine_args
    from vllm_plugins.refusals.engine import check_engine

    arguments = {
        "model": model,
        "skip_tokenizer_init": True,
        "max_model_len": 1024,
        **eviction_engine_args(**settings),
        **(engine or {}),
    }
    check_engine(EngineArgs(**arguments).create_engine_config())


def test_a_plain_llama_is_accepted(tiny_llama):
    check(tiny_llama[0], policy="h2o", sparsity=0.5, layer_groups=2)


@pytest.mark.parametrize(
    ("engine", "settings", "sentence"),
    [
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            {},
            "remove the speculative configuration",
        ),
        ({"kv_cache_dtype": "fp8"}, {}, 'on CUDA only; use kv_cache_dtype="auto"'),
        ({"kv_cache_dtype": "fp8_e5m2"}, {}, 'use kv_cache_dtype="auto"'),
        ({"kv_cache_dtype": "int8_per_token_head"}, {}, "kv_cache_dtype is int8_per_token_head"),
        (
            {"kv_cache_dtype": "bfloat16", "dtype": "float32"},
            {},
            "kv_cache_dtype is bfloat16",
        ),
        ({"kv_offloading_size": 1.0}, {}, "KV connector is OffloadingConnector"),
        ({"kv_transfer_config": MULTI}, {}, "KV connector is MultiConnector"),
        ({"disable_hybrid_kv_cache_manager": True}, {"layer_groups": 2}, "hybrid KV-cache manager"),
        ({"block_size": 16}, {}, "so use 32 or 64"),
        ({"block_size": 64}, {"budget_tokens": 96}, "give at least 128"),
        ({}, {"layer_groups": 3}, "use one of: 1, 2, 4"),
    ],
)
def test_engine_settings(engine, settings, sentence, tiny_llama):
    from vllm_plugins import EvictionConfigError

    with pytest.raises(EvictionConfigError) as error:
        check(tiny_llama[0], engine, **settings)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (MISTRAL, "set max_model_len to at most their window of 256 tokens"),
        (DEEPSEEK, "latent attention (MLA)"),
        (LLAMA4, "layers that attend within chunks of 256 tokens"),
    ],
)
def test_models(config, sentence, model):
    from vllm_plugins import EvictionConfigError

    with pytest.raises(EvictionConfigError) as error:
        check(model(config))
    assert sentence in str(error.value)


def test_a_window_that_never_binds_is_accepted(model):
    check(model(MISTRAL), {"max_model_len": 256})


def test_windows_beside_full_attention_are_accepted(model):
    check(model(HYBRID), layer_groups=2)


@pytest.mark.parametrize(
    ("engine", "settings", "sentence"),
    [
        ({"disable_hybrid_kv_cache_manager": True}, {}, "drop disable_hybrid_kv_cache_manager"),
        ({}, {"layer_groups": 4}, "divide the model's 2 layers with full attention"),
    ],
)
def test_windows_beside_full_attention_need(engine, settings, sentence, model):
    from vllm_plugins import EvictionConfigError

    with pytest.raises(EvictionConfigError) as error:
        check(model(HYBRID), engine, **settings)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"worker_cls": "auto"}, "pass worker_cls"),
        ({"kv_offloading_size": 1.0}, "KV connector is OffloadingConnector"),
        ({"kv_transfer_config": MULTI}, "drop kv_transfer_config, MultiConnector"),
    ],
)
def test_a_hand_written_configuration_is_refused_too(
    changed, sentence, tiny_llama, no_engine, monkeypatch
):
    """Without our checks in front, the engine itself refuses with the sentence."""
    from vllm import LLM
    from vllm.model_executor.model_loader import base_loader

    from vllm_plugins import eviction_engine_args

    loaded = []
    load = base_loader.BaseModelLoader.load_model
    monkeypatch.setattr(
        base_loader.BaseModelLoader,
        "load_model",
        lambda *arguments, **options: loaded.append(1) or load(*arguments, **options),
    )
    with pytest.raises(Exception, match=sentence):
        LLM(
            tiny_llama[0],
            skip_tokenizer_init=True,
            max_model_len=512,
            kv_cache_memory_bytes=16 << 20,
            enforce_eager=True,
            **{**eviction_engine_args(), **changed},
        )
    if "worker_cls" not in changed:
        assert not loaded, "refused before the weights are read"


def test_a_second_engine_in_one_process_is_refused(tiny_engines, tiny_llama):
    """vLLM has one connector a process: the first engine would stop evicting without a word."""
    from vllm import SamplingParams

    llm = tiny_engines()
    with pytest.raises(Exception, match="another engine with a KV connector runs in this process"):
        make_tiny(tiny_llama[0])
    params = SamplingParams(
        max_tokens=2, detokenize=False, extra_args={"kv_policy": "h2o", "kv_sparsity": 0.5}
    )
    (output,) = llm.generate([{"prompt_token_ids": [1] * 600}], params, use_tqdm=False)
    assert output.kv_transfer_params["kv_eviction"]["blocks_evicted"] > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--methods", "h20"], "unknown policy 'h20'; use one of: dense, h2o, cab"),
        (["--sparsity", "1.0"], "give a number from 0"),
        (["--sparsity", "-0.1"], "give a number from 0"),
        (["--sparsity", "abc"], "give a number from 0"),
        (["--policy-args", '{"cab": {"local": 0.9}}'], "sum to 1"),
        (["--policy-args", "{"], "not JSON"),
        (["--block-size", "48"], "so use 32 or 64"),
        (["--score-queries", "none"], 'give "all"'),
        (["--layer-groups", "0"], "layer_groups is 0"),
        (["--num-runs", "2", "--seeds", "1"], "drop one"),
        (["--num-samples", "0"], "--num-samples must be at least 1"),
        (["--context-length", "1"], "at least 2 tokens"),
        (["--dataset", "text:/nowhere.txt"], "cannot read /nowhere.txt"),
        (["--model", "/nowhere"], "holds no config.json"),
        (["--output-dir", "/proc/x"], "cannot write to /proc/x"),
    ],
)
def test_command_line(arguments, sentence, capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("word " * 9000)
    base = ["offline", "--dataset", f"text:{text}", "--output-dir", str(tmp_path / "runs")]
    assert main([*base, *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("kv-eviction: ")
    assert sentence in error


def test_exit_status_of_the_installed_command(tmp_path):
    command = [sys.executable, "-m", "harness", "offline", "--methods", "nope"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("kv-eviction: unknown policy 'nope'")
    assert not any(tmp_path.iterdir()), "nothing is written before the check"


@pytest.mark.parametrize("config", [MISTRAL, DEEPSEEK], ids=["mistral", "deepseek"])
def test_command_line_refuses_models(config, model, capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("word " * 2000)
    arguments = ["--model", model(config), "--dataset", f"text:{text}"]
    assert main(["offline", *arguments, "--output-dir", str(tmp_path / "runs")]) == 2
    assert "use a model with" in capsys.readouterr().err
