"""The only harness file that imports vLLM: starts an engine, scores windows, ends it cleanly."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import UsageError
from .models import resolve_model
from .specification import EngineSpecification


@dataclass(frozen=True)
class ScoredWindow:
    """One window as the engine saw it.

    ``log_likelihoods``: natural log of the probability of tokens 1 .. n-1, float ``[n - 1]``.
    ``record``: the plugin's counters for the request.
    """

    log_likelihoods: list[float]
    record: dict[str, Any]


class Engine:
    """A running vLLM engine under one ``EngineSpecification``."""

    def __init__(self, llm: Any, specification: EngineSpecification) -> None:
        self._llm = llm
        self.specification = specification
        config = llm.llm_engine.vllm_config
        self.dtype = str(config.model_config.dtype).removeprefix("torch.")
        self.num_layers = config.model_config.get_num_layers(config.parallel_config)
        self.num_blocks = config.cache_config.num_gpu_blocks
        self.bytes_per_block = _bytes_per_block(config, specification)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of ``text``, without special tokens."""
        tokenizer = self._llm.get_tokenizer()
        tokenizer.model_max_length = len(text)  # no warning: windows are cut from this
        return tokenizer(text, add_special_tokens=False).input_ids

    def score(
        self,
        windows: Sequence[list[int]],
        settings: dict[str, Any],
        progress: Callable[[int], None] = lambda finished: None,
    ) -> tuple[list[ScoredWindow], float]:
        """Prompt log-probs of ``windows`` under per-request ``settings``, and the seconds spent.

        Windows run in waves of equal size, at most ``max_num_seqs``, each in chunks of
        ``prefill_chunk`` tokens with evictions between chunks.

        Raises:
            RuntimeError: vLLM did not keep to the chunk, or a policy failed: the result would
                not be what the specification says.

        """
        started = time.perf_counter()
        scored: list[ScoredWindow] = []
        num_waves = -(-len(windows) // self.specification.max_num_seqs)
        for wave in np.array_split(np.arange(len(windows)), num_waves):
            # vLLM gives a request that is alone the whole token budget, whatever the chunk
            # (scheduler.py, long_prefill_token_threshold), so a lone window gets a companion.
            companions = 1 if len(wave) == 1 else 0
            batch = [windows[i] for i in wave] + [windows[wave[0]]] * companions
            scored += self._run(batch, settings, progress)[: len(wave)]
        seconds = time.perf_counter() - started
        for window, result in zip(windows, scored, strict=True):
            self._verify(window, result.record)
        return scored, seconds

    def _run(
        self, windows: Sequence[list[int]], settings: dict[str, Any], progress: Any
    ) -> list[ScoredWindow]:
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False, extra_args=settings
        )
        engine = self._llm.llm_engine
        names = [
            engine.add_request(str(i), {"prompt_token_ids": window}, params)
            for i, window in enumerate(windows)
        ]
        done: dict[int, ScoredWindow] = {}
        try:
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if output.finished:
                        done[int(output.request_id)] = _scored(output)
                        progress(1)
        except BaseException:
            engine.abort_request(names, internal=True)
            raise
        return [done[i] for i in range(len(windows))]

    def _verify(self, window: list[int], record: dict[str, Any]) -> None:
        chunk = self.specification.prefill_chunk
        steps = -(-len(window) // chunk)
        if record["num_steps"] != steps:
            raise RuntimeError(
                f"a window of {len(window)} tokens took {record['num_steps']} steps, not the "
                f"{steps} that a chunk of {chunk} makes ({record['preemptions']} preemptions)"
            )
        for failure in ("policy_error", "refused_settings"):
            if failure in record:
                raise RuntimeError(f"{failure}: {record[failure]}")

    def peak_memory_mb(self, windows: Sequence[ScoredWindow]) -> float:
        """KV-cache memory held at the peak of a run, MiB: pool blocks in use times their size."""
        blocks = max(window.record["peak_pool_blocks"] for window in windows)
        return blocks * self.bytes_per_block / 2**20


@contextmanager
def running(specification: EngineSpecification) -> Iterator[Engine]:
    """An engine for the duration of the block.

    The pool holds every window in flight without eviction, so that no method is preempted and
    all are compared at the same concurrency.

    Raises:
        UsageError: vLLM refuses model or settings. ``EvictionConfigError``: eviction does.

    """
    # In one process all windows of a wave are in the queue before the first step, so they move
    # in lockstep at the given chunk; and there is one peak memory to report.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    from vllm import LLM, EngineArgs

    from vllm_plugins import EvictionConfigError, eviction_engine_args
    from vllm_plugins.checks import check_engine

    arguments = {
        "model": resolve_model(specification.model),
        "max_model_len": specification.context_length + 1,
        "dtype": specification.dtype,
        "max_num_seqs": specification.max_num_seqs,
        "max_num_batched_tokens": specification.max_num_batched_tokens,
        "long_prefill_token_threshold": specification.prefill_chunk,
        "enforce_eager": True,
        "use_tqdm_on_load": False,
        "seed": 0,
        **eviction_engine_args(block_size=specification.block_size, **specification.eviction),
    }
    try:
        config = EngineArgs(**arguments).create_engine_config()
    except EvictionConfigError:
        raise
    except Exception as error:  # whatever Transformers and vLLM find wrong with a model
        reason = " ".join(str(error).split())
        raise UsageError(f"vLLM refuses {specification.model}: {reason}") from None
    check_engine(config)
    arguments["kv_cache_memory_bytes"] = _pool_bytes(config, specification)
    llm = LLM(**arguments)
    try:
        yield Engine(llm, specification)
    finally:
        # Left to the interpreter's exit, vLLM's engine can abort there with status 134.
        llm.llm_engine.engine_core.shutdown()


def _scored(output: Any) -> ScoredWindow:
    tokens = output.prompt_token_ids
    entries = output.prompt_logprobs
    values = [float(entries[i][tokens[i]].logprob) for i in range(1, len(tokens))]
    return ScoredWindow(values, (output.kv_transfer_params or {}).get("kv_eviction", {}))


def _bytes_per_block(config: Any, specification: EngineSpecification) -> int:
    """Bytes of one physical block: keys and values of the layers of one layer group."""
    model, parallel = config.model_config, config.parallel_config
    layers = model.get_num_layers(parallel) // specification.eviction["layer_groups"]
    width = 2 * model.get_num_kv_heads(parallel) * model.get_head_size()
    return layers * width * specification.block_size * model.dtype.itemsize


def _pool_bytes(config: Any, specification: EngineSpecification) -> int:
    groups = specification.eviction["layer_groups"]
    per_window = -(-config.model_config.max_model_len // specification.block_size) + 1
    blocks = (specification.max_num_seqs * per_window + 1) * groups
    return (blocks + 1) * _bytes_per_block(config, specification)
