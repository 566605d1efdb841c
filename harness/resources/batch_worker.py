"""The child's side of ``batch_engine``: a vLLM engine that runs a load per line of its input.

The first line starts the engine, each further one is a load; an answer is one line of JSON. What
vLLM prints goes to the log, as standard output carries the answers.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from ..records.specifications import STEADY
from ..study.batch_specification import Batch
from .eviction_summary import summary


class Worker:
    """A vLLM engine, its core in a process of its own: vLLM's default."""

    def __init__(self, question: dict[str, Any]) -> None:
        from vllm import LLM
        from vllm.v1.engine.core_client import InprocClient

        block_size = question["block_size"]
        started = time.perf_counter()
        self._llm = LLM(**engine_arguments(**question), disable_log_stats=False)
        self._prefix_caching = question["prefix_caching"]
        self._has_plugin = question["eviction"] is not None
        config = self._llm.llm_engine.vllm_config
        # A block holds one group's layers.
        groups = (question["eviction"] or {}).get("layer_groups", 1)
        blocks = config.cache_config.num_gpu_blocks // groups
        self.ready = {
            "engine_start_seconds": time.perf_counter() - started,
            "kv_cache_tokens": blocks * block_size,
            "own_core_process": not isinstance(self._llm.llm_engine.engine_core, InprocClient),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
        }

    def run(self, load: dict[str, Any]) -> dict[str, Any]:
        """See ``BatchEngine.run``."""
        return self._steady(load) if load.get("kind") == STEADY else self._batch(load)

    def _steady(self, load: dict[str, Any]) -> dict[str, Any]:
        from ..study.steady_load import SteadyLoad
        from .steady_engine import VllmSteadyEngine
        from .steady_loop import measure

        fields = {k: v for k, v in load.items() if k not in ("kind", "seed", "settings")}
        settings, tokens = load["settings"], self.ready["kv_cache_tokens"]
        engine = VllmSteadyEngine(self._llm, tokens, settings, self._counters)
        return measure(SteadyLoad.parse(fields), load["seed"], settings, engine)

    def _batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        from .batch_turns import run_turns

        vocabulary = self._llm.llm_engine.model_config.get_vocab_size()
        asked = Batch(**{k: v for k, v in batch.items() if k not in ("seed", "settings")})
        params = _parameters(asked, batch["settings"])
        before = self._counters()
        made = run_turns(self._llm, params, asked, batch["seed"], vocabulary, self._prefix_caching)
        after = self._counters()
        scored = before["scoring_seconds"]
        evicted = summary(made.records)
        if asked.beam_width > 1:
            made.prompt_tokens, made.cached_tokens = (
                after[name] - before[name] for name in ("looked_up_tokens", "cached_tokens")
            )
            if self._has_plugin:
                names = ("blocks_evicted", "policy_errors")
                evicted = {name: after[name] - before[name] for name in names}
        return {
            "seconds": sum(made.seconds),
            "seconds_by_turn": made.seconds,
            "output_tokens": sum(map(len, made.answers)),
            "prompt_tokens": made.prompt_tokens,
            "cached_tokens": made.cached_tokens,
            "preemptions": after["preemptions"] - before["preemptions"],
            "eviction": evicted,
            "tokens_sha256": hashlib.sha256(json.dumps(made.answers).encode()).hexdigest(),
            "scoring_seconds": {
                phase: total - scored.get(phase, 0.0)
                for phase, total in after["scoring_seconds"].items()
            },
        }

    def shutdown(self) -> None:
        """End the engine."""
        self._llm.llm_engine.engine_core.shutdown()

    def _counters(self) -> dict[str, Any]:
        """So far, by vLLM's counters: preemptions; tokens that were looked for in the prefix cache
        and that were there; of the plugin the scheduler's time for decisions, the workers' for
        scores by phase (none without it), blocks evicted and policies that failed.

        From the registry itself: ``LLM.get_metrics`` cuts counters to whole numbers
        (``vllm/v1/metrics/reader.py``).
        """
        from prometheus_client import REGISTRY

        samples = [sample for metric in REGISTRY.collect() for sample in metric.samples]

        def named(name: str) -> list[Any]:
            return [sample for sample in samples if sample.name == f"vllm:{name}_total"]

        def total(name: str) -> float:
            return sum(sample.value for sample in named(name))

        return {
            "preemptions": int(total("num_preemptions")),
            "looked_up_tokens": int(total("prefix_cache_queries")),
            "cached_tokens": int(total("prefix_cache_hits")),
            "blocks_evicted": int(total("kv_eviction_blocks_evicted")),
            "policy_errors": int(total("kv_eviction_policy_errors")),
            "decision_seconds": total("kv_eviction_decision_seconds"),
            "scoring_seconds": {
                s.labels["phase"]: s.value for s in named("kv_eviction_scoring_seconds")
            },
        }


def _parameters(batch: Batch, settings: dict[str, Any]) -> Any:
    """vLLM's, of a batch's requests or of its searches. ``settings``: of requests; a search hands
    none on."""
    from vllm import SamplingParams
    from vllm.sampling_params import BeamSearchParams

    if batch.beam_width > 1:
        return BeamSearchParams(batch.beam_width, batch.output_tokens, ignore_eos=True)
    return SamplingParams(
        max_tokens=batch.output_tokens,
        temperature=0.0,
        ignore_eos=True,
        detokenize=False,
        extra_args=settings or None,
    )


def engine_arguments(
    arguments: dict[str, Any],
    block_size: int,
    eviction: dict[str, Any] | None,
    prefix_caching: bool,
) -> dict[str, Any]:
    """All engine arguments of vLLM, as ``worker_arguments`` tells them."""
    if eviction is None:
        return {**arguments, "block_size": block_size, "enable_prefix_caching": prefix_caching}
    from vllm_plugins import eviction_engine_args

    settings = {**eviction, "block_size": block_size, "prefix_caching": prefix_caching}
    return {**arguments, **eviction_engine_args(**settings)}


def main() -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is no answer

    def answer(make: Callable[[], dict[str, Any]]) -> bool:
        try:
            made = make()
        except Exception as error:
            import traceback

            traceback.print_exc()
            made = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        print(json.dumps(made), file=answers, flush=True)
        return "error" not in made

    worker: Worker | None = None
    # The core's process would outlive this one, if it is told to end and just ends.
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))

    def begin() -> dict[str, Any]:
        nonlocal worker
        worker = Worker(json.loads(sys.stdin.readline()))
        return worker.ready

    if answer(begin) and worker is not None:
        for line in sys.stdin:
            load = json.loads(line)
            answer(lambda: worker.run(load))  # noqa: B023  called at once
        worker.shutdown()
    sys.stdout.flush()
    os._exit(0)  # all is answered; an engine can stumble while the interpreter exits


if __name__ == "__main__":
    main()
