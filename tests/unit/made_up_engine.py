"""Engines that answer at once, and what a sweep on them reads."""

from __future__ import annotations

import re
from contextlib import contextmanager

import numpy as np
import pytest

import harness.sweep.offline as sweep_module
from harness.resources.scored import Answer, Scored, ScoredWindow
from harness.study.settings import Study
from harness.sweep.offline import Sweep

from .records import Characters

SETTINGS = {
    "methods": ["dense", "h2o", "cab"],
    "sparsity": [0.5],
    "context_length": 256,
    "num_samples": 6,
    "num_runs": 2,
    "throughput": True,
    "load_requests": 4,
}
NUM_RUNS = 3 * 2 * 2


class MadeUpEngine:
    """Answers by the tokens and the settings alone; ``trouble`` is called before each run, and may
    raise, or give a log-prob to spoil a window with."""

    device, dtype, num_layers, num_blocks, bytes_per_block = "cpu", "float32", 1, 99, 1 << 10

    def __init__(self, specification, trouble):
        self.specification = specification
        self._trouble = trouble

    def score(self, windows, settings, min_context=1, progress=lambda n: None):
        spoilt = None
        if len(windows[0]) == self.specification.context_length:  # not the warm-up
            spoilt = self._trouble()
        harm = {"dense": 0.0, "h2o": 0.2, "cab": 0.1}[settings["kv_policy"]]
        scored = Scored(seconds=1.0, trace={"tokens": [64, 128], "blocks": [2.0, 3.0]})
        for window in windows:
            rng = np.random.default_rng(window)
            values = -rng.random(len(window) - 1)
            values[64:] -= harm * rng.random(len(values) - 64) if len(values) > 64 else 0.0
            if spoilt is not None:
                values[9] = spoilt
            scored.windows.append(ScoredWindow(values.tolist(), record(harm)))
            progress(1)
        return scored

    def answer(self, requests, settings, progress=lambda n: None):
        self._trouble()
        harm = {"dense": 0.0, "h2o": 0.2, "cab": 0.1}[settings["kv_policy"]]
        answers = []
        for prompt, max_tokens in requests:
            found = re.findall(r"is: (\d{7})", "".join(map(chr, prompt)))
            right = np.random.default_rng(list(prompt)).random() >= 4 * harm
            text = " ".join(found) if right else "none"
            tokens = [len(prompt) % 7] * max_tokens
            answers.append(Answer(tokens, text, not right, record(harm)))
            progress(1)
        return 1.0, answers

    def load(self, prompts, output_tokens, settings, progress=lambda n: None):
        progress(len(prompts))
        return float(output_tokens), [record(0.1)] * len(prompts)

    def peak_memory_mib(self, records):
        return 1.5


def record(harm):
    return {
        "first_eviction_tokens": 64 if harm else None,
        "blocks_evicted": 2 if harm else 0,
        "decisions": 1,
        "decision_seconds": 0.01,
        "preemptions": 0,
        "average_blocks": 3.0,
        "peak_blocks": 4.0,
        "peak_pool_blocks": 30,
    }


class Engines:
    """Starts made-up engines, counts them, and makes the trouble that a test asks for."""

    def __init__(self):
        self.started = 0
        self.runs = 0
        self.at_run = {}

    @contextmanager
    def running(self, specification):
        self.started += 1
        yield MadeUpEngine(specification, self._trouble)

    def _trouble(self):
        self.runs += 1
        trouble = self.at_run.get(self.runs)
        if isinstance(trouble, BaseException):
            raise trouble
        return trouble


@contextmanager
def made_up_engines():
    """Sweeps in the block run on made-up engines."""
    made = Engines()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.sweep.texts.load_tokenizer", lambda path: Characters())
        patch.setattr(sweep_module, "running", made.running)
        patch.setattr(sweep_module, "preflight", lambda specification: None)
        patch.setattr(sweep_module, "device_type", lambda: "cpu")
        yield made


def made_up_text(folder):
    """A dataset of 20,000 characters."""
    text = folder / "words.txt"
    text.write_text(" ".join(f"word{i % 97} of {i}" for i in range(1500)))
    return f"text:{text}"


def run(settings, folder, **options):
    sweep = Sweep(Study.parse(settings), folder, **options)
    sweep.run()
    return sweep
