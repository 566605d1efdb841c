"""Models and engines, shared between tests: an engine takes half a minute to start.

vLLM keeps what it compiled by the path of the model and ``max_model_len``, so tests use the same
ones where they can.
"""

import numpy as np
import pytest

from .engines import EngineSlot, generate, tokens
from .models import make_llama


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """Folder of a random Llama with SmolLM2's head shape."""
    return make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 512, size=n).tolist() for n in (900, 40, 2000, 333, 1500, 700)]


@pytest.fixture(scope="package")
def engine_slot():
    """For tests that share engines, also across modules."""
    slot = EngineSlot()
    yield slot
    slot.leave()


@pytest.fixture
def no_engine(engine_slot):
    """For tests whose processes need the memory."""
    engine_slot.leave()


@pytest.fixture(scope="package")
def engines(engine_slot, llama):
    """Make an engine (``engines.start``), or take the last one made if it is the same."""

    def make(settings, **engine):
        return engine_slot.get(settings, **{"model": llama, **engine})

    return make


@pytest.fixture(scope="package")
def stock(engines, prompts):
    """Stock vLLM's answers to ``prompts``, by their length: a row's batch can change its
    rounding, and with it a token."""
    llm = engines(None)
    return {length: tokens(generate(llm, prompts, None, length)) for length in (64, 200)}
