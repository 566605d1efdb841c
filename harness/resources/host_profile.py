"""Where the time of an engine's steps goes on the host: of the thread that runs vLLM's core.

A timer's signal interrupts that thread every ``INTERVAL_S``. What it worked at is told by the
functions of vLLM on its stack (``vllm/v1/engine/core.py``, ``step_with_batch_queue``), and whose
work it was by the innermost of them. A signal that comes while a call into C lasts is handled when
it returns, so a sample stands for the whole time since the one before.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

NUM_STEPS = 200
INTERVAL_S = 2e-3

PHASES = {
    "_process_input_queue": "requests",
    "schedule": "scheduling",
    "execute_model": "launching",
    "sample_tokens": "launching",
    "result": "waiting",
    "update_from_output": "updating",
}
"""A function of the core's step, and what it is: the outermost one on the stack counts."""
NAMES = ("scheduling", "launching", "updating", "requests", "rest", "waiting")
"""``rest`` is none of the phases. ``waiting`` is for the device; all before are work."""
_CORE = "vllm.v1.engine.core"
_PLUGIN, _VLLM = "vllm_plugins", "vllm"


def classify(stack: Iterable[tuple[str, str]]) -> tuple[str, bool]:
    """What a thread worked at, and whether at something of the plug-in.

    Args:
        stack: module and function of each frame, the innermost first.

    """
    phase, owner = "rest", None
    for module, function in stack:
        package = module.partition(".")[0]
        if package in (_PLUGIN, _VLLM) and owner is None:
            owner = package
        # A plug-in's function may bear such a name, and call vLLM's.
        if package != _PLUGIN:
            phase = PHASES.get(function, phase)
    return phase, owner == _PLUGIN


def host_of_steps(
    step: Callable[[], Any], in_workers: Callable[..., list[Any]]
) -> dict[str, float] | None:
    """Milliseconds per step by what the core's thread works at, over ``NUM_STEPS`` steps.

    Args:
        step: makes one step.
        in_workers: ``LLM.collective_rpc``.

    Returns:
        ``NAMES``; ``plugin``, the part of all work that is the plug-in's; ``core_cpu`` and
        ``process_cpu``, processor time of that thread and of its whole process; ``client_cpu``, of
        this process, which makes the load; ``ms_per_step``, ``steps``. Steps are counted by who
        takes their outputs: the core's, as long as ``client_cpu`` is less than ``ms_per_step``,
        so that it waits for each. None where workers have processes of their own, as the core is
        not among them.

    """
    step()
    if not all(in_workers(_begin)):
        in_workers(_end)
        return None
    step()  # what waited for the call
    started, used = time.perf_counter(), time.process_time()
    for _ in range(NUM_STEPS):
        step()
    ms_per_step = 1e3 * (time.perf_counter() - started) / NUM_STEPS
    client_cpu = 1e3 * (time.process_time() - used) / NUM_STEPS
    shares = in_workers(_end)[0]
    return {
        "steps": NUM_STEPS,
        "ms_per_step": ms_per_step,
        **{name: share * ms_per_step for name, share in shares.items()},
        "client_cpu": client_cpu,
    }


class _Sampler:
    """Of the main thread of this process; begun and ended by it."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys((*NAMES, "plugin"), 0.0)
        self._cpu = -time.thread_time(), -time.process_time()
        self._last = time.perf_counter()
        self._former = signal.signal(signal.SIGALRM, self._sample)
        signal.setitimer(signal.ITIMER_REAL, INTERVAL_S, INTERVAL_S)

    def _sample(self, _: int, frame: FrameType | None) -> None:
        now = time.perf_counter()
        phase, ours = classify(_stack(frame))
        self.seconds[phase] += now - self._last
        if ours and phase != "waiting":
            self.seconds["plugin"] += now - self._last
        self._last = now

    def end(self) -> dict[str, float]:
        """Each part's share of the time since the beginning. Processor time of a process with
        several busy threads is more than all of it."""
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, self._former)
        whole = sum(self.seconds[name] for name in NAMES)
        core, process = self._cpu[0] + time.thread_time(), self._cpu[1] + time.process_time()
        told = {**self.seconds, "core_cpu": core, "process_cpu": process}
        return {name: seconds / whole for name, seconds in told.items()}


def _stack(frame: FrameType | None) -> Iterable[tuple[str, str]]:
    while frame is not None:
        yield frame.f_globals.get("__name__", ""), frame.f_code.co_name
        frame = frame.f_back


_sampler: _Sampler | None = None


def _begin(worker: Any) -> bool:
    """In a worker: whether its thread is the core's."""
    global _sampler
    modules = {module for module, _ in _stack(sys._getframe())}
    # Signals are the main thread's.
    if _CORE not in modules or threading.current_thread() is not threading.main_thread():
        return False
    _sampler = _Sampler()
    return True


def _end(worker: Any) -> dict[str, float]:
    """In a worker: the shares since ``_begin``."""
    global _sampler
    sampler, _sampler = _sampler, None
    return sampler.end() if sampler is not None else {}
