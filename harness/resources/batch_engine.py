"""An engine in a process of its own that runs loads: the parent's side.

One JSON line goes to the child per load, and one comes back (``batch_worker``). A process of its
own, because stock vLLM must not load the plugin, and because an engine gives its memory back only
when its process ends.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..study.batch_specification import BatchEngineSpecification
from ..study.bench_load import BenchLoad
from .processes import PATIENCE_S, end_group, last_error, start

_LAST_LINES = 5
"""Of a dead child's log, in the message."""
_GOODBYE_S = 10.0
"""A child whose input is closed gets so long to end by itself."""


class BatchEngineError(RuntimeError):
    """An engine did not start, or a batch on it failed; the message says what its log says."""


class BatchEngine:
    """A running engine.

    ``ready``: what it said when it was: ``engine_start_seconds``, ``kv_cache_tokens`` (what the
    pool holds), ``dtype``, ``own_core_process``.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], log: Path, specification: BatchEngineSpecification
    ) -> None:
        self._process, self._log = process, log
        self._specification = specification
        self._received = b""
        self.ready: dict[str, Any] = {}
        self.warm: list[dict[str, Any]] = []
        """Settings under which a batch has run."""

    def start(self) -> None:
        """Start vLLM in the child.

        Raises:
            BatchEngineError: it failed, or took longer than it may.

        """
        s = self._specification
        self.ready = self._ask(worker_arguments(s), s.startup_timeout_s, "start")

    def run(self, load: BenchLoad, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
        """Run a load.

        Args:
            load: a batch, from empty to done; or a steady load, which is measured in its window.
            seed: random tokens follow from it, and of a steady load lengths and ages.
            settings: of every request, ``SamplingParams.extra_args``.

        Returns:
            ``seconds``, ``output_tokens``, ``preemptions``, ``eviction`` (over the requests'
            records; None: no plugin), ``scoring_seconds`` by phase. Of a batch also
            ``seconds_by_turn``, ``prompt_tokens`` and of them ``cached_tokens``, and
            ``tokens_sha256`` (over every token of every request: equal where two sides answered
            the same), of a steady load what ``steady_loop.measure`` gives.

        Raises:
            BatchEngineError: it failed, or took longer than it may.

        """
        question = {**load.to_dict(), "seed": seed, "settings": settings}
        return self._ask(question, self._specification.batch_timeout_s, "finish a batch")

    def _ask(self, question: dict[str, Any], timeout_s: float, what: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # a dead child says why in its log
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        answer = json.loads(self._line(timeout_s, what))
        if "error" in answer:
            raise BatchEngineError(f"{answer['error']} (log: {self._log})")
        return answer

    def _line(self, timeout_s: float, what: str) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._received:
            left = deadline - time.monotonic()
            if left <= 0:
                raise BatchEngineError(
                    f"the engine did not {what} within {timeout_s:g} s (log: {self._log})"
                )
            if not select.select([descriptor], [], [], left)[0]:
                continue
            if not (part := os.read(descriptor, 1 << 16)):
                raise BatchEngineError(self._death())
            self._received += part
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _death(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_GOODBYE_S)
        return (
            f"the engine ended with status {self._process.returncode}: {last_error(self._log)} "
            f"(log: {self._log}, which ends with: {_tail(self._log)})"
        )


@contextmanager
def batch_engine(specification: BatchEngineSpecification, log: Path) -> Iterator[BatchEngine]:
    """An engine for the duration of the block, started.

    Whatever way the block is left, every process of it is ended.

    Args:
        specification: of the engine.
        log: everything it prints.

    Raises:
        BatchEngineError: it did not start.

    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {
        # vLLM's default. The harness, which looked at the platform first, has set otherwise for
        # itself (``launch._quiet``), and children inherit it.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        # The profiler of a steady load begins and ends in the engine's own process.
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "VLLM_NO_USAGE_STATS": "1",
        **specification.environment,
        **({"VLLM_PLUGINS": ""} if specification.eviction is None else {}),
    }
    with log.open("wb") as errors:
        process = start(
            worker_command(),
            environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
    try:
        engine = BatchEngine(process, log, specification)
        engine.start()
        yield engine
        assert process.stdin is not None
        with suppress(subprocess.TimeoutExpired, BrokenPipeError):
            process.stdin.close()
            process.wait(_GOODBYE_S)
    finally:
        end_group(process, PATIENCE_S)
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            with suppress(BrokenPipeError):  # what a dead child never read
                stream.close()


def worker_command() -> list[str]:
    """The child's command."""
    return [sys.executable, "-m", "harness.resources.batch_worker"]


def worker_arguments(specification: BatchEngineSpecification) -> dict[str, Any]:
    """What a child starts its engine with, as plain JSON values."""
    return {
        "arguments": {"seed": 0, **specification.arguments, "model": specification.model_path},
        "block_size": specification.block_size,
        "eviction": specification.eviction,
        "prefix_caching": specification.prefix_caching,
    }


def _tail(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " | ".join(line[:200] for line in lines[-_LAST_LINES:]) or "nothing"
