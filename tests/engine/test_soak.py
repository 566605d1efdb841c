"""Some rounds of ``scripts/soak``: random traffic, nothing leaks, nobody is wronged."""

import json
import subprocess
import sys

import pytest

from ..conftest import ROOT
from ..soak.watch import Watch
from .conftest import connector_of
from .traffic import add


@pytest.fixture(scope="module")
def record(engine_slot, tmp_path_factory):
    """The command's record, by engine."""
    engine_slot.leave()  # two at a time are ten times slower
    output = tmp_path_factory.mktemp("soak") / "record.json"
    command = [sys.executable, "-m", "tests.soak", "--rounds", "5", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


def test_random_traffic_leaves_nothing_behind(record):
    """Blocks, block tables of the worker, and answers are checked by the command at every step."""
    assert record["failures"] == []
    assert len(record["engines"]) == 2
    for engine in record["engines"]:
        assert engine["leaked_blocks"] == 0
        assert engine["requests"] == 300
        assert engine["answered"] == 300 - engine["aborts"]
        assert len(engine["memory_mib"]) == 5


def test_the_traffic_has_all_that_it_is_meant_to_have(record):
    for engine in record["engines"]:
        for kind in ("aborts", "refusals", "preemptions", "prefix_hits", "blocks_evicted"):
            assert engine[kind] > 10, (engine["engine"], kind)
        assert engine["samples"] > engine["answered"], "some ask for several answers"
        assert engine["packs"] > 50
        assert engine["copies"] > 50
        assert engine["compared"] > 25


def test_answers_are_compared_where_blocks_went(record):
    whole = record["engines"][0]
    assert whole["compared_evicting"] > 10
    assert sum(engine["ties"] for engine in record["engines"]) <= 2


def test_what_it_watches_for_is_noticed(tiny_engines):
    """A block that leaks, a worker that reads another block, a request that is remembered."""
    llm = tiny_engines(prefix_caching=True)
    watch, connector = Watch(llm), connector_of(llm)
    name = add(llm, "a", list(range(200)), {"kv_policy": "dense"}, 20)
    llm.llm_engine.step()
    watch.check_tables()
    table = watch._runner.requests[name].block_ids[0]
    table[0], block = 0, table[0]
    with pytest.raises(AssertionError, match=name):
        watch.check_tables()
    table[0] = block
    leaked = connector._pool.get_new_blocks(1)
    with pytest.raises(AssertionError, match="1 references, 0 holders"):
        connector.check_integrity()
    connector._pool.free_blocks(leaked)
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    connector.ledger.sharing.first_eviction(name, 32)
    with pytest.raises(AssertionError, match=r"sharing\.exact"):
        watch.rest()
    connector.ledger.sharing.forget(name)
    watch.rest()
