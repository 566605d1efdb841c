"""Where the host's time goes: what a stack says, and that nothing of the timer is left."""

import signal
import time

import pytest

from harness.resources import host_profile
from harness.resources.host_profile import NAMES, NUM_STEPS, classify, host_of_steps

CORE = [("vllm.v1.engine.core", name) for name in ("step_with_batch_queue", "run_busy_loop")]
SCHEDULER = "vllm.v1.core.sched.scheduler"
WORKER = "vllm.v1.worker.gpu_worker"
LAUNCHING, WAITING = ("launching", False), ("waiting", False)
UNIPROC = "vllm.v1.executor.uniproc_executor"


@pytest.mark.parametrize(
    ("stack", "told"),
    [
        ([], ("rest", False)),
        ([(SCHEDULER, "schedule")], ("scheduling", False)),
        ([(SCHEDULER, "allocate_slots"), (SCHEDULER, "schedule")], ("scheduling", False)),
        ([("torch._ops", "__call__"), (WORKER, "run"), (UNIPROC, "execute_model")], LAUNCHING),
        (
            [("numpy", "sort"), ("vllm_plugins.ledger", "decide"), (SCHEDULER, "schedule")],
            ("scheduling", True),
        ),
        # A method of the plug-in that is called like vLLM's, and calls vLLM's.
        (
            [
                (WORKER, "execute_model"),
                ("vllm_plugins.worker", "execute_model"),
                (UNIPROC, "sample_tokens"),
            ],
            LAUNCHING,
        ),
        ([("vllm_plugins.worker", "execute_model")], ("rest", True)),
        ([("torch", "synchronize"), (UNIPROC, "get_output"), (UNIPROC, "result")], WAITING),
        # What an update waits for is a part of the update.
        (
            [("concurrent.futures", "result"), (SCHEDULER, "update_from_output")],
            ("updating", False),
        ),
    ],
)
def test_what_a_stack_says(stack, told):
    assert classify([*stack, *CORE]) == told


class Core:
    """A step schedules, and waits twice as long."""

    def __init__(self):
        self.steps = 0

    def schedule(self):
        until = time.perf_counter() + 2e-3
        while time.perf_counter() < until:
            pass

    def result(self):
        time.sleep(4e-3)

    def step(self):
        self.steps += 1
        self.schedule()
        self.result()


def test_what_the_cores_thread_works_at(monkeypatch):
    core, former = Core(), signal.getsignal(signal.SIGALRM)
    monkeypatch.setattr(host_profile, "_CORE", __name__)
    made = host_of_steps(core.step, lambda function: [function(None)])
    assert core.steps == NUM_STEPS + 2
    assert sum(made[name] for name in NAMES) == pytest.approx(made["ms_per_step"])
    assert made["scheduling"] > 1.0
    assert made["waiting"] > 2.0
    assert made["plugin"] == 0.0
    assert 0 < made["core_cpu"] < made["ms_per_step"]
    assert made["core_cpu"] <= 1.01 * made["process_cpu"]
    assert signal.getsignal(signal.SIGALRM) is former
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_worker_with_a_process_of_its_own_tells_nothing():
    assert host_of_steps(lambda: None, lambda function: [function(None)]) is None
    assert host_profile._sampler is None
