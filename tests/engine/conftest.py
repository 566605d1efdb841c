"""Engines, shared between tests: one SmolLM2, and small random models by settings."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from harness.study.settings import ALL_SCORES  # as the tests' references have it

SMOLLM2_ARGUMENTS = {
    "dtype": "float32",  # CPUs without bfloat16 units are many times slower in it
    "max_model_len": 2304,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 512,
    "long_prefill_token_threshold": 64,
    "kv_cache_memory_bytes": 1400 << 20,
    "enforce_eager": True,
    "seed": 0,
}


def connector_of(llm: Any) -> Any:
    """The scheduler's connector of an in-process engine."""
    return llm.llm_engine.engine_core.engine_core.scheduler.connector


def end(llm: Any) -> None:
    llm.llm_engine.engine_core.shutdown()
    gc.collect()


@pytest.fixture(scope="module")
def smollm2_engine(smollm2):
    """Every method and sparsity through per-request settings; integrity checked at every step."""
    from vllm import LLM

    from vllm_plugins import eviction_engine_args

    llm = LLM(
        smollm2,
        **SMOLLM2_ARGUMENTS,
        disable_log_stats=False,
        **eviction_engine_args(
            policy="dense", check_integrity=True, trace_decisions=True, **ALL_SCORES
        ),
    )
    yield llm
    end(llm)


@pytest.fixture(scope="session")
def offline_figure(smollm2, canterbury, tmp_path_factory):
    """What ``kv-eviction offline`` records of H2O at 0.6: four windows of 320, chunks of 64."""
    folder = tmp_path_factory.mktemp("figure")
    done = offline(folder, "--methods", "h2o", "--sparsity", "0.6", "--num-samples", "4")
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (folder / "e").glob("h2o*_seed0.json")
    return json.loads(path.read_text())


def offline(folder: Any, *arguments: str, **options: Any) -> Any:
    """The command as a user runs it, in ``folder``, experiment ``e``, windows of 320 tokens."""
    command = [sys.executable, "-m", "harness", "offline", "--context-length", "320"]
    command += ["--num-samples", "3", "--output-dir", str(folder), "--experiment-name", "e"]
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, cwd=folder, check=False, **options
    )


TINY = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,  # peaked attention: scores must differ to decide anything
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """A small random Llama with grouped-query attention: (folder, Transformers model)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY)).float().eval()
    folder = tmp_path_factory.mktemp("tiny-llama")
    model.save_pretrained(folder)
    return str(folder), model


def make_tiny(folder: str, engine: dict[str, Any] | None = None, **settings: Any) -> Any:
    """An engine over the random model in ``folder``, with the plugin's ``settings``."""
    from vllm import LLM

    from vllm_plugins import eviction_engine_args

    arguments = {
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 512,
        "long_prefill_token_threshold": 64,
        "kv_cache_memory_bytes": 64 << 20,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "dtype": "float32",
        **(engine or {}),
    }
    return LLM(
        folder,
        **arguments,
        **eviction_engine_args(
            check_integrity=True,
            trace_decisions=True,
            **{"policy": "dense", **ALL_SCORES, **settings},
        ),
    )


@pytest.fixture(scope="module")
def tiny_engines(tiny_llama):
    """Make an engine over the random model; the last one made is kept, the others ended."""
    running: dict[str, Any] = {}

    def make(engine: dict[str, Any] | None = None, **settings: Any) -> Any:
        key = repr((engine, settings))
        if key not in running:
            for llm in running.values():
                end(llm)
            running.clear()
            running[key] = make_tiny(tiny_llama[0], engine, **settings)
        return running[key]

    yield make
    for llm in running.values():
        end(llm)
