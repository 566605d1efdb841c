"""Runs requests on a running engine: windows to score, loads to serve."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..records.specifications import DENSE
from ..study.specification import EngineSpecification
from .kv_bytes import bytes_per_block
from .outputs import answer_of, check_policy, own_log_probs, record_of
from .scored import Answer, Scored, ScoredWindow, UnfaithfulRun
from .waves import waves

Progress = Callable[[int], None]
MAX_TRACE_POINTS = 64


class Engine:
    """A running vLLM engine under one ``EngineSpecification``."""

    def __init__(self, llm: Any, specification: EngineSpecification) -> None:
        self._llm = llm
        self.specification = specification
        config = llm.llm_engine.vllm_config
        self.dtype = str(config.model_config.dtype).removeprefix("torch.")
        self.num_layers = config.model_config.get_num_layers(config.parallel_config)
        self.num_blocks = config.cache_config.num_gpu_blocks
        self.bytes_per_block = bytes_per_block(config, specification)
        self.device = config.device_config.device_type

    def score(
        self,
        windows: Sequence[list[int]],
        settings: dict[str, Any],
        min_context: int = 1,
        progress: Progress = lambda finished: None,
    ) -> Scored:
        """Log-probs of ``windows`` under per-request ``settings``.

        Windows run in waves of equal size, at most ``kv_pool_windows``. Protocol ``chunked``:
        as prompts, in chunks of ``prefill_chunk`` tokens with evictions between chunks.
        ``decode``: the first ``min_context`` tokens as prompt, the others forced one by one.

        Raises:
            UnfaithfulRun: vLLM did not keep to the chunk, or a policy failed: the result would
                not be what the specification says.

        """
        scored = Scored()
        started = time.perf_counter()
        num_waves = -(-len(windows) // self.specification.kv_pool_windows)
        for wave in np.array_split(np.arange(len(windows)), num_waves):
            # vLLM gives a request that is alone the whole token budget, whatever the chunk
            # (scheduler.py, long_prefill_token_threshold), so a lone window gets a companion.
            companion = [windows[wave[0]]] if len(wave) == 1 else []
            batch = [*(windows[i] for i in wave), *companion]
            pool: list[tuple[int, int]] = []
            outputs = self._run(
                [self._scoring_request(window, settings, min_context) for window in batch],
                progress,
                pool,
                len(wave),
            )
            if not scored.trace:
                scored.trace = self._trace(pool, len(batch))
            results = map(self._scored, batch, outputs)
            scored.windows += list(results)[: len(wave)]
        scored.seconds = time.perf_counter() - started
        for window, result in zip(windows, scored.windows, strict=True):
            self._verify(window, result.record, min_context)
        return scored

    def answer(
        self,
        requests: Sequence[tuple[Sequence[int], int]],
        settings: dict[str, Any],
        progress: Progress = lambda finished: None,
    ) -> tuple[float, list[Answer]]:
        """Seconds to answer ``requests`` greedily, and the answers, in their order.

        Requests run in waves of at most ``kv_pool_windows``, their prompts in chunks of
        ``prefill_chunk`` tokens. An end-of-sequence token ends an answer. Where the engine caches
        prefixes, a dense request computes each prompt before.

        Args:
            requests: prompts and the most tokens of their answers.
            settings: of every request.
            progress: hears of each one that is answered.

        Raises:
            UnfaithfulRun: see ``score``.

        """
        from vllm import SamplingParams

        def asked(
            prompt: Sequence[int], max_tokens: int, own: dict[str, Any] = settings
        ) -> tuple[list[int], Any]:
            params = SamplingParams(max_tokens=max_tokens, temperature=0.0, extra_args=own)
            return list(prompt), params

        answers: dict[int, Answer] = {}
        started = time.perf_counter()
        steps = [self._prompt_steps(len(prompt)) for prompt, _ in requests]
        for wave, needs_companion in waves(steps, self.specification.kv_pool_windows):
            batch = [asked(*requests[i]) for i in wave]
            companion = [asked(requests[wave[0]][0], 1)] if needs_companion else []
            if self.specification.prefix_caching:
                dense = [asked(requests[i][0], 1, {"kv_policy": DENSE}) for i in wave]
                self._run([*dense, *companion], progress, num_counted=0)
            outputs = self._run([*batch, *companion], progress, num_counted=len(wave))
            answers |= {i: answer_of(output) for i, output in zip(wave, outputs, strict=False)}
        seconds = time.perf_counter() - started
        for i, answer in answers.items():
            made, prompt_tokens = len(answer.token_ids), len(requests[i][0])
            told = f"a prompt of {prompt_tokens} tokens answered with {made}"
            if self.specification.prefix_caching:
                self._check_hit(prompt_tokens, answer.cached_tokens, settings)
                told += f", {answer.cached_tokens} of them from the cache,"
            computed = self._prompt_steps(prompt_tokens - answer.cached_tokens)
            self._check_steps(answer.record, computed + made - 1, told)
        return seconds, [answers[i] for i in range(len(requests))]

    def load(
        self,
        prompts: Sequence[list[int]],
        output_tokens: int,
        settings: dict[str, Any],
        progress: Progress = lambda finished: None,
    ) -> tuple[float, list[dict[str, Any]]]:
        """Seconds to serve ``prompts`` that are all there at the start, each answered with
        exactly ``output_tokens`` tokens, and the requests' records. No log-probs.

        Raises:
            UnfaithfulRun: a request was answered otherwise, or a policy failed.

        """
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=output_tokens,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            extra_args=settings,
        )
        started = time.perf_counter()
        outputs = self._run([(prompt, params) for prompt in prompts], progress)
        seconds = time.perf_counter() - started
        records = [record_of(output) for output in outputs]
        for output, record in zip(outputs, records, strict=True):
            check_policy(record)
            made = len(output.outputs[0].token_ids)
            if made != output_tokens:
                raise UnfaithfulRun(f"a request made {made} tokens, not {output_tokens}")
        return seconds, records

    def peak_memory_mib(self, records: Sequence[dict[str, Any]]) -> float:
        """KV-cache memory held at the peak of a run, MiB: pool blocks in use times their size."""
        blocks = max(record["peak_pool_blocks"] for record in records)
        return blocks * self.bytes_per_block / 2**20

    def _scoring_request(
        self, window: list[int], settings: dict[str, Any], min_context: int
    ) -> tuple[list[int], Any]:
        from vllm import SamplingParams

        # Flat log-probs are plain lists; a dictionary per token would dominate at many windows.
        common = {
            "temperature": 0.0,
            "detokenize": False,
            "extra_args": settings,
            "flat_logprobs": True,
        }
        if self.specification.protocol == "decode":
            forced = window[min_context:]
            return window[:min_context], SamplingParams(
                max_tokens=len(forced),
                logprobs=0,
                ignore_eos=True,
                trace_decode_token_ids=forced,
                **common,
            )
        return window, SamplingParams(max_tokens=1, prompt_logprobs=0, **common)

    def _run(
        self,
        requests: Sequence[tuple[list[int], Any]],
        progress: Progress,
        pool: list[tuple[int, int]] | None = None,
        num_counted: int | None = None,
    ) -> list[Any]:
        """Outputs of ``requests``, in their order; ``pool`` gets, for each step before the first
        request ends, tokens scheduled of a request and blocks in use; ``progress`` hears of the
        first ``num_counted`` (None: all)."""
        counted = len(requests) if num_counted is None else num_counted
        engine = self._llm.llm_engine
        names = [
            engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
            for i, (prompt, params) in enumerate(requests)
        ]
        done: dict[int, Any] = {}
        try:
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if output.finished:
                        place = int(output.request_id)
                        done[place] = output
                        if place < counted:
                            progress(1)
                if pool is not None and not done:
                    pool += self._pool_state()
        except BaseException:
            engine.abort_request(names, internal=True)
            raise
        return [done[i] for i in range(len(requests))]

    def _pool_state(self) -> list[tuple[int, int]]:
        scheduler = self._llm.llm_engine.engine_core.engine_core.scheduler
        pool = scheduler.kv_cache_manager.block_pool
        used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        return [(request.num_computed_tokens, used) for request in scheduler.running[:1]]

    def _trace(self, pool: list[tuple[int, int]], num_windows: int) -> dict[str, list[float]]:
        groups = self.specification.eviction["layer_groups"]
        stride = -(-len(pool) // MAX_TRACE_POINTS) or 1
        points = pool[stride - 1 :: stride]
        return {
            "tokens": [tokens for tokens, _ in points],
            "blocks": [round(blocks / num_windows / groups, 3) for _, blocks in points],
        }

    def _scored(self, window: list[int], output: Any) -> ScoredWindow:
        if self.specification.protocol == "decode":
            values = own_log_probs(output.outputs[0].logprobs)
            if list(output.outputs[0].token_ids) != window[len(output.prompt_token_ids) :]:
                raise UnfaithfulRun("vLLM decoded other tokens than the window's")
            values = [0.0] * (len(output.prompt_token_ids) - 1) + values
        else:
            values = own_log_probs(output.prompt_logprobs)[1:]  # nothing predicts the first token
        if len(values) != len(window) - 1:
            raise UnfaithfulRun(
                f"vLLM gave {len(values)} log-probs for a window of {len(window)} tokens"
            )
        return ScoredWindow(values, record_of(output))

    def _verify(self, window: list[int], record: dict[str, Any], min_context: int) -> None:
        if self.specification.protocol == "decode":
            # The last forced token is never an input.
            steps = self._prompt_steps(min_context) + len(window) - min_context - 1
        else:
            steps = self._prompt_steps(len(window))
        self._check_steps(record, steps, f"a window of {len(window)} tokens")

    def _check_hit(self, prompt_tokens: int, cached_tokens: int, settings: dict[str, Any]) -> None:
        """A hit has whole blocks, of all but the tokens that are always computed."""
        from vllm_plugins.config import EvictionConfig
        from vllm_plugins.prefix_sharing import always_computed

        block_size = self.specification.block_size
        config = EvictionConfig.parse(self.specification.eviction)
        scored = config.request_settings(settings, block_size).gathers_attention
        expected = max(0, prompt_tokens - always_computed(scored))
        expected -= expected % block_size
        if cached_tokens < expected:
            raise UnfaithfulRun(
                f"the prefix cache had {cached_tokens} tokens of a prompt of {prompt_tokens}, not "
                f"the {expected} that a dense request computed before"
            )

    def _prompt_steps(self, num_tokens: int) -> int:
        return -(-num_tokens // self.specification.prefill_chunk)

    def _check_steps(self, record: dict[str, Any], steps: int, told: str) -> None:
        check_policy(record)
        if record["num_steps"] != steps:
            raise UnfaithfulRun(
                f"{told} took {record['num_steps']} steps, not the {steps} that a chunk of "
                f"{self.specification.prefill_chunk} makes ({record['preemptions']} preemptions)"
            )
