"""What tests on a GPU share: engines, requests, and what is looked at afterwards."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from harness.study.settings import ALL_SCORES  # as the tests' references have it
from tests.engine.conftest import connector_of

NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
POLICIES = ("h2o", "cab", "streaming", "random", "key_norm")
ENGINE = {
    "max_model_len": 4096,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 1024,
    "gpu_memory_utilization": 0.2,  # other engines may run beside it
    "kv_cache_memory_bytes": 1 << 30,
    "skip_tokenizer_init": True,
    "seed": 0,
}
SETTINGS = {
    "block_size": 16,
    "policy": "dense",
    "check_integrity": True,
    "trace_decisions": True,
    "prefix_caching": False,  # a hit has other scores: runs would not repeat
    **ALL_SCORES,
}
"""Requests bring their policy, and their granularity: one engine serves both."""


def start(settings: dict[str, Any] | None, *, prefix_caching: bool = False, **engine: Any) -> Any:
    """An engine; of ``settings`` None, stock vLLM, whose ``prefix_caching`` is told apart."""
    from vllm import LLM

    from vllm_plugins import eviction_engine_args

    options = {"block_size": 16, "enable_prefix_caching": prefix_caching}
    if settings is not None:
        options = eviction_engine_args(**{**SETTINGS, **settings})
    return LLM(**{**ENGINE, **engine, **options})


class EngineSlot:
    """The one engine of this process; it is kept until another is asked for."""

    def __init__(self) -> None:
        self._key, self._llm = "", None

    def get(self, settings: dict[str, Any] | None, **engine: Any) -> Any:
        """The engine of these arguments of ``start``."""
        key = repr((settings, sorted(engine.items())))
        if self._llm is None or self._key != key:
            self.leave()
            self._key, self._llm = key, start(settings, **engine)
        return self._llm

    def leave(self) -> None:
        """End what runs, and give its memory back."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def generate(
    llm: Any,
    prompts: list[list[int]],
    extra: dict[str, Any] | None,
    max_tokens: int,
    **options: Any,
) -> list[Any]:
    """Greedy answers of exactly ``max_tokens``."""
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=0.0,
        ignore_eos=True,
        detokenize=False,
        extra_args=extra,
        **options,
    )
    return llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def records(outputs: list[Any]) -> list[dict[str, Any]]:
    return [output.kv_transfer_params["kv_eviction"] for output in outputs]


def check_idle(llm: Any) -> None:
    """All blocks are free, and nobody is remembered."""
    connector = connector_of(llm)
    connector.check_integrity()
    assert connector._pool.get_num_free_blocks() == connector._pool.num_gpu_blocks - 1
    assert connector.ledger.requests == {}
