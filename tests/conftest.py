"""Paths and the in-process mode that engine tests look inside of."""

import os
from pathlib import Path

import pytest
import torch
import yaml

# One process: tests step the engine and read the scheduler's state between steps.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if WORKER and hasattr(os, "sched_setaffinity"):
    # Workers, and the engines they start, share no core: OpenMP's threads spin while they wait, and
    # two engines on the same cores take ten times as long as one.
    cores = sorted(os.sched_getaffinity(0))
    count = min(int(os.environ["PYTEST_XDIST_WORKER_COUNT"]), len(cores))
    own = cores[int(WORKER.removeprefix("gw")) % count :: count]
    os.sched_setaffinity(0, own)
    torch.set_num_threads(len(own))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined

ROOT = Path(__file__).resolve().parent.parent
# Processes that tests start run this checkout too, in whatever folder, whatever is installed.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
TEST_DATA = "KV_EVICTION_TEST_DATA"
YAML_TYPES = dict(yaml.SafeLoader.yaml_constructors)


@pytest.fixture(autouse=True)
def yaml_as_it_is():
    """vLLM's structured output imports lm-format-enforcer, which has YAML read dates as texts."""
    yield
    yaml.SafeLoader.yaml_constructors.update(YAML_TYPES)


def data_file(name: str) -> Path:
    """A file that is no part of the repository; the test is skipped where it cannot be had.

    A folder that was named and lacks the file is a mistake, not a reason to skip.
    """
    named = os.environ.get(TEST_DATA)
    path = (Path(named) if named else ROOT.parent / "shared" / "data") / name
    if named and not path.is_file():
        pytest.fail(f"{TEST_DATA} is {named}, which has no {name}")
    if not path.is_file():
        pytest.skip(f"needs {name}; name a folder that has it with {TEST_DATA}")
    return path


@pytest.fixture(scope="session")
def wiki_test() -> str:
    """WikiText-2 raw test; not part of the repository."""
    return data_file("text/wiki.test.raw").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def canterbury() -> str:
    """The embedded text; ``scripts/test`` fetches it before the tests, which use no network."""
    from harness.inputs.corpora import load_text

    return load_text("canterbury")


@pytest.fixture(scope="session")
def smollm2() -> str:
    """Folder of SmolLM2-135M; ``scripts/test`` prepares it before the tests."""
    from harness.inputs.models import prepare_smollm2

    return str(prepare_smollm2())
