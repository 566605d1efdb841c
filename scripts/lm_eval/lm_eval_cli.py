"""Runs lm-eval's command in its own environment and reads what it wrote."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from planned import NEEDLE

from harness.errors import UsageError
from harness.records.files import read_json
from harness.resources.processes import last_error

PYTHON = Path(__file__).resolve().parents[2] / ".venv-lm-eval" / "bin" / "python"
TASKS = Path(__file__).resolve().parent / "tasks"
_PACKAGES = ("lm_eval", "transformers", "tokenizers", "datasets", "numpy")
_ABOUT_THE_MACHINE = ("pretty_env_info", "git_hash", "upper_git_hash")
"""Left out: records have hardware, versions and commit in their own form."""
_TIMEOUT_S = 600


class Failed(RuntimeError):
    """lm-eval did not give a result; the message says why."""


def versions(python: Path = PYTHON) -> dict[str, str]:
    """Of the packages that matter, in lm-eval's environment.

    Raises:
        UsageError: there is no such environment.

    """
    asked = (
        "import json, importlib.metadata as m; "
        f"print(json.dumps({{p: m.version(p) for p in {_PACKAGES!r}}}))"
    )
    try:
        made = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise UsageError(
            "lm-eval has no environment here; make it with scripts/lm_eval/setup"
        ) from None
    return dict(json.loads(made.stdout))


def arguments(
    task: str, *, name: str, base_url: str, length: int, settings: Mapping[str, Any], output: str
) -> list[str]:
    """Of ``python -m lm_eval``.

    Args:
        task: of ``tasks/``.
        name: that the server calls the model by.
        base_url: of the server.
        length: tokens of the longest request.
        settings: of each request, in ``vllm_xargs``; empty: none.
        output: folder of its results.

    """
    model = {
        "model": name,
        "base_url": f"{base_url}/v1/completions",
        "tokenizer": "model",
        "tokenizer_backend": "huggingface",
        "max_length": length,
        "num_concurrent": 1,
        "max_retries": 1,
        "timeout": _TIMEOUT_S,
    }
    made = ["run", "--model", "local-completions", "--model_args", json.dumps(model)]
    made += ["--include_path", "tasks", "--tasks", task]
    made += ["--output_path", output, "--log_samples"]
    return [*made, "--gen_kwargs", json.dumps({"vllm_xargs": settings})] if settings else made


def run(flags: Sequence[str], scratch: Path, output: str, log: Path, python: Path = PYTHON) -> None:
    """Run lm-eval in ``scratch``, where the tasks' files lie; ``output`` below it is emptied first.

    Raises:
        Failed: it ended with another status than 0.

    """
    shutil.rmtree(scratch / output, ignore_errors=True)
    shutil.copytree(TASKS, scratch / "tasks", dirs_exist_ok=True)
    # No hub is asked for anything, and files of another run are not taken for these.
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(scratch / "hf"), "PYTHONPATH": ""}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as stream:
        status = subprocess.run(
            [python, "-m", "lm_eval", *flags],
            cwd=scratch,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    if status:
        raise Failed(f"lm-eval ended with status {status}: {last_error(log)} (log: {log})")


def read(folder: Path, task: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """lm-eval's own result, less what it says of the machine, and its samples in short.

    Args:
        folder: that it wrote to.
        task: that it ran.

    Raises:
        Failed: something is not there.

    """
    results, samples = (
        sorted(folder.rglob(pattern)) for pattern in ("results_*.json", f"samples_{task}_*.jsonl")
    )
    if len(results) != 1 or len(samples) != 1:
        raise Failed(f"lm-eval left no result in {folder}")
    made = {k: v for k, v in read_json(results[0]).items() if k not in _ABOUT_THE_MACHINE}
    lines = samples[0].read_text(encoding="utf-8").splitlines()
    return made, sorted((_short(json.loads(line), task) for line in lines), key=lambda s: s["doc"])


def _short(sample: dict[str, Any], task: str) -> dict[str, Any]:
    """Without its prompt: the task's file has that."""
    made = {"doc": sample["doc_id"], "tokens": sample["doc"]["tokens"]}
    response = sample["resps"][0][0]
    if task == NEEDLE:
        return {**made, "answer": response, "found": sample["exact_match"]}
    value = response[0] if isinstance(response, list) else response
    return {**made, "log_likelihood": round(float(value), 4)}
