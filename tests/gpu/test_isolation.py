"""A request that keeps its cache must not notice neighbours that lose theirs.

The same arrivals run twice, step for step the same batches: once the neighbours are scored but
lose nothing, once they lose most of their blocks, which others then get. Attention splits a row's
keys by what else is in the batch, unless vLLM is in its batch-invariant mode, a process's setting.
"""

import json
from contextlib import ExitStack

import pytest

from ..child import child
from .engines import NEEDS_GPU
from .isolation import NUM_WATCHED

pytestmark = NEEDS_GPU
MODES = ("graphs", "eager")


@pytest.fixture(scope="module")
def outputs(llama, tmp_path_factory):
    """Of both modes, how the process ended and the file with what it saw; they run side by side."""
    folder = tmp_path_factory.mktemp("isolation")
    paths = {mode: folder / f"{mode}.json" for mode in MODES}
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                child("tests.gpu.isolation", llama, mode, str(path), VLLM_BATCH_INVARIANT="1")
            )
            for mode, path in paths.items()
        ]
        ended = [process.wait(timeout=400) for process in processes]
    return dict(zip(MODES, zip(ended, paths.values(), strict=True), strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_tokens_of_a_request_do_not_depend_on_evicting_neighbours(mode, outputs):
    ended, path = outputs[mode]
    assert ended == 0
    kept, lost = json.loads(path.read_text())
    assert kept["evicted"] == 0
    assert lost["evicted"] > 1000, "the neighbours were meant to lose blocks"
    assert len(lost["watched"]) == NUM_WATCHED
    assert lost["watched"] == kept["watched"]
