"""Engines, shared between tests: one SmolLM2, and small random models by settings."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from harness.records.stored import read_record
from harness.study.settings import ALL_SCORES  # as the tests' references have it

from ..conftest import ROOT

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


class EngineSlot:
    """The one engine of this process. It is kept until another is asked for."""

    def __init__(self) -> None:
        self._key, self._llm = "", None

    def get(self, key: str, start: Callable[[], Any]) -> Any:
        """The engine of ``key``, started where it does not run."""
        if self._llm is None or self._key != key:
            self.leave()
            self._key, self._llm = key, start()
        return self._llm

    def leave(self) -> None:
        """End what runs."""
        if self._llm is not None:
            end(self._llm)
        self._llm = None


@pytest.fixture(scope="package")
def engine_slot():
    """For tests that share engines, also across modules."""
    slot = EngineSlot()
    yield slot
    slot.leave()


@pytest.fixture
def no_engine(engine_slot):
    """For tests that start an engine of their own."""
    engine_slot.leave()


@pytest.fixture(scope="module")
def smollm2_engine(smollm2, engine_slot):
    """Every method and sparsity through per-request settings; integrity checked at every step."""
    from vllm import LLM

    from vllm_plugins import eviction_engine_args

    return engine_slot.get(
        "smollm2",
        lambda: LLM(
            smollm2,
            **SMOLLM2_ARGUMENTS,
            disable_log_stats=False,
            **eviction_engine_args(
                policy="dense",
                check_integrity=True,
                trace_decisions=True,
                prefix_caching=False,
                **ALL_SCORES,
            ),
        ),
    )


def offline(folder: Any, *arguments: str, **options: Any) -> Any:
    """The command as a user runs it, in ``folder``, experiment ``e``, windows of 320 tokens."""
    command = [*HARNESS, *OFFLINE, "--output-dir", str(folder), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, check=False, **options
    )


HARNESS = (sys.executable, "-m", "harness")
OFFLINE = ("offline", "--experiment-name", "e", "--context-length", "320")


@pytest.fixture(scope="session")
def readme_policy(tmp_path_factory):
    """The policy of README.md's section "Add a policy", installed: its name and its folder."""
    readme = (ROOT / "README.md").read_text()
    section = readme.split("## Add a policy", 1)[1].split("\n## ", 1)[0]
    code, project = re.findall(r"```(?:python|toml)\n(.*?)```", section, re.DOTALL)
    assert len(code.splitlines()) <= 20
    entry = re.search(r'"kv_eviction.policies"\]\n(.+) = "(.+)"', project)
    name, target = entry.groups()
    module = target.split(":")[0]
    folder = tmp_path_factory.mktemp("policy")
    (folder / f"{module}.py").write_text(code)
    metadata = folder / f"{module}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[kv_eviction.policies]\n{name} = {target}\n")
    return name, folder


@pytest.fixture(scope="session")
def evaluation(smollm2, canterbury, readme_policy, tmp_path_factory):
    """Records, by method, of ``kv-eviction offline`` with the model and the text that it comes
    with: dense, H2O and README.md's policy at 0.6; four windows of 320, chunks of 64."""
    folder = tmp_path_factory.mktemp("evaluation")
    name, package = readme_policy
    methods = ("dense", "h2o", name)
    done = offline(
        folder,
        "--methods",
        *methods,
        "--sparsity",
        "0.6",
        "--num-samples",
        "4",
        env={**os.environ, "PYTHONPATH": os.pathsep.join((os.environ["PYTHONPATH"], str(package)))},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        method: read_record(path)
        for method in methods
        for path in (folder / "e").glob(f"{method}_*_seed0.json")
    }


@pytest.fixture(scope="session")
def wiki_windows(smollm2, wiki_test):
    """Every 25th window of the committed evaluation: its records, and the tokens of each."""
    folder = ROOT / "results" / "full-evaluation" / "dataset=text-wiki.test.raw"
    record = read_record(folder / "dense_s0_ctx2048_seed0.json")
    windows = record["windows"][::25]
    assert len(windows) == 2
    return windows, windows_of(smollm2, wiki_test, [window["start"] for window in windows], 2048)


@pytest.fixture(scope="session")
def wiki_losses(smollm2, wiki_windows):
    """Nats a token of each of ``wiki_windows``, by Transformers."""
    return transformers_losses(smollm2, wiki_windows[1])


def windows_of(folder: str, text: str, starts: list[int], length: int) -> list[list[int]]:
    """The tokens of ``text`` from each of ``starts`` on."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids
    return [tokens[start : start + length] for start in starts]


def transformers_losses(folder: str, windows: list[list[int]]) -> list[float]:
    """Nats a token of each window by Transformers in float32, one forward pass a window."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses = []
    for window in windows:
        tokens = torch.tensor([window])
        with torch.inference_mode():
            losses.append(model(tokens, labels=tokens).loss.item())
    return losses


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
TINY_BLOCK_BYTES = 2 * 2 * 32 * 32 * 4 * 4
"""Keys and values, KV heads, tokens, head size, layers, and four bytes each."""


def save_tiny(folder: Any) -> Any:
    """Write a small random Llama with grouped-query attention into ``folder``, and return it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY)).float().eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """A small random Llama with grouped-query attention: (folder, Transformers model)."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    return str(folder), save_tiny(folder)


def tiny_arguments(engine: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    """Arguments of an engine over the small random model, with the plugin's ``settings``.

    Blocks unless they say otherwise: their decisions are made where a test can look at them. No
    prefixes are shared unless they say so: a reference scores every query of a prompt.
    """
    from vllm_plugins import eviction_engine_args

    return {
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 512,
        "long_prefill_token_threshold": 64,
        "kv_cache_memory_bytes": 64 << 20,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "dtype": "float32",
        **(engine or {}),
        **eviction_engine_args(
            check_integrity=True,
            **{
                "trace_decisions": True,
                "policy": "dense",
                "granularity": "block",
                "prefix_caching": False,
                **ALL_SCORES,
                **settings,
            },
        ),
    }


def make_tiny(folder: str, engine: dict[str, Any] | None = None, **settings: Any) -> Any:
    """An engine with ``tiny_arguments`` over the model in ``folder``."""
    from vllm import LLM

    return LLM(folder, **tiny_arguments(engine, **settings))


@pytest.fixture(scope="package")
def tiny_engines(tiny_llama, engine_slot):
    """Make an engine over the random model, or take the last one made if it is the same."""

    def make(engine: dict[str, Any] | None = None, **settings: Any) -> Any:
        key = repr((engine, settings))
        return engine_slot.get(key, lambda: make_tiny(tiny_llama[0], engine, **settings))

    return make


@pytest.fixture(scope="session")
def small_llama(smollm2, tmp_path_factory):
    """Folder of a small random Llama that reads text: with SmolLM2's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("small-llama")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(**{**TINY, "vocab_size": len(tokenizer), "tie_word_embeddings": True})
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def long_llama(tmp_path_factory):
    """Folder of the small random Llama, for sequences of 8,192 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("long-llama")
    LlamaForCausalLM(LlamaConfig(**{**TINY, "max_position_embeddings": 8192})).save_pretrained(
        folder
    )
    return str(folder)


@pytest.fixture(scope="session")
def small_text(canterbury):
    return canterbury[:400_000]


@pytest.fixture(scope="session")
def small_inputs(small_llama, small_text, tmp_path_factory):
    """Flags of ``kv-eviction offline`` for that model and text."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(small_text, encoding="utf-8")
    return "--model", small_llama, "--dataset", f"text:{text}", "--num-samples", "3"


# Ten runs of three windows, and five loads.
SWEEP = (
    *("--methods", "dense", "h2o", "cab", "--sparsity", "0.5", "0.6", "--num-runs", "2"),
    *("--throughput", "--load-runs", "1", "--load-requests", "4", "--load-output-tokens", "8"),
)


@pytest.fixture(scope="session")
def experiment(small_inputs, tmp_path_factory):
    """Folder of an undisturbed sweep of the small model, and how its process ended."""
    folder = tmp_path_factory.mktemp("offline")
    done = offline(folder, *small_inputs, *SWEEP)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "e", done
