"""Paths and the in-process mode that engine tests look inside of."""

import os
from pathlib import Path

import pytest
import torch

# One process: tests step the engine and read the scheduler's state between steps.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined

ROOT = Path(__file__).resolve().parent.parent
SHARED_TEXTS = ROOT.parent / "shared" / "data" / "text"


@pytest.fixture(scope="session")
def wiki_test() -> str:
    """WikiText-2 raw test; not part of the repository."""
    path = SHARED_TEXTS / "wiki.test.raw"
    if not path.is_file():
        pytest.skip(f"needs WikiText-2 raw test at {path}")
    return path.read_text(encoding="utf-8")


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
