"""Arbitrary traffic through vLLM's scheduler, pool and managers: a state machine over a model of
the workers' memory.

After every step, ``simulated_worker.py`` looks whether whoever reads a block finds its own tokens
and scores there, ``simulated_scheduler.py`` what the prefix cache offers and who is answered, and
``scheduling_invariants.py`` who holds which block, who was evicted, and by which knowledge.
Hypothesis chooses what happens, and shortens what fails. ``FAULTS`` are noticed, each by its own
sentence. A report of a former life that counts in the next one is noticed too, but late; a test of
``test_ledger.py`` has it.

    KV_EVICTION_TEST_EXAMPLES=500 pytest tests/unit/test_scheduler_machine.py

runs as many examples of each engine, random ones: hours, not seconds.
"""

import os
from collections import Counter
from functools import partial
from zlib import crc32

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    precondition,
    rule,
    run_state_machine_as_test,
)
from vllm.v1.core.block_pool import BlockPool

from vllm_plugins.ledger import Ledger
from vllm_plugins.live_blocks import LiveBlocks
from vllm_plugins.manager import EvictableManager
from vllm_plugins.policies import get_policy
from vllm_plugins.prefix_sharing import PrefixSharing
from vllm_plugins.request_state import NEVER, RequestState
from vllm_plugins.request_table import RequestTable

from .simulated_scheduler import REPORTS, SchedulerOverMemory
from .simulated_worker import BLOCK_SIZE, VOCABULARY, Memory

EXAMPLES = os.environ.get("KV_EVICTION_TEST_EXAMPLES")
SETTINGS = settings(
    max_examples=int(EXAMPLES or 3),
    stateful_step_count=60,
    derandomize=EXAMPLES is None,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
POLICIES = ("h2o", "cab", "streaming", "random", "key_norm", "snapkv", "keydiff", "tova")
FORMS = [
    (name, granularity)
    for name in POLICIES
    for granularity, form in (("block", "select"), ("token", "tokens"))
    if getattr(get_policy(name), form) is not None
]
KINDS = ("copies", "packs", "adopted blocks", "evicted blocks", "stops")
"""Rarer events are met by the faults that they bring out."""
LONGEST_PREFIX = 12 * BLOCK_SIZE
ROOTS = [np.random.default_rng(seed).integers(0, VOCABULARY, LONGEST_PREFIX) for seed in range(2)]


def settings_of_requests():
    """Dense, or some policy's with a budget of either kind."""
    budgets = st.one_of(
        st.fixed_dictionaries({"kv_sparsity": st.sampled_from([0.0, 0.5, 0.9])}),
        st.fixed_dictionaries({"kv_budget_tokens": st.sampled_from([64, 128, 200])}),
    )
    policies = st.sampled_from(FORMS).map(
        lambda form: {"kv_policy": form[0], "kv_granularity": form[1]}
    )
    forman = {
        "kv_policy": "cab",
        "kv_granularity": "block",
        "kv_policy_args": {"bridge_definition": "forman"},
    }
    evicting = st.tuples(st.one_of(policies, policies, st.just(forman)), budgets)
    return st.one_of(
        st.just({"kv_policy": "dense"}), *[evicting.map(lambda parts: parts[0] | parts[1])] * 4
    )


def prompts():
    """The first tokens of a root, and some of the request's own, which others may have too."""

    def prompt(root, shared, seed, own):
        tail = np.random.default_rng(seed).integers(0, VOCABULARY, own)
        return [*ROOTS[root][:shared].tolist(), *tail.tolist()]

    return st.builds(
        prompt,
        st.sampled_from([0, 1]),
        st.integers(1, LONGEST_PREFIX),
        st.integers(0, 3),
        st.integers(1, 60),
    )


REQUESTS = st.tuples(
    st.integers(1, 150),  # tokens asked for
    settings_of_requests(),
    st.integers(0, 2),  # priority
    st.sampled_from([None, None, *range(VOCABULARY)]),  # the token that ends the answer
)


class Traffic(RuleBasedStateMachine):
    """Requests arrive, end, are aborted and preempted; scores come late or never.

    Args:
        make: the engine.
        counts: what happened in all examples, by kind.

    """

    def __init__(self, make, counts):
        super().__init__()
        self.simulation, self.counts = make(), counts

    @property
    def live(self):
        return sorted(self.simulation.scheduler.requests)

    def add(self, prompt, max_tokens, chosen, level, stop):
        ranked = self.simulation.scheduler.policy.value == "priority"
        self.simulation.add(prompt, max_tokens, chosen, level if ranked else 0, stop)
        self.simulation.check()

    @rule(requests=st.lists(st.tuples(prompts(), REQUESTS), min_size=1, max_size=3))
    def arrive(self, requests):
        for prompt, rest in requests:
            self.add(prompt, *rest)

    @rule(prompt=prompts(), requests=st.lists(REQUESTS, min_size=2, max_size=4))
    def arrive_alike(self, prompt, requests):
        for rest in requests:
            self.add(prompt, *rest)

    @precondition(lambda self: self.simulation.is_busy)
    @rule(reports=st.sampled_from(REPORTS))
    def step(self, reports):
        self.simulation.reports = reports
        self.simulation.step()

    @precondition(lambda self: self.simulation.is_busy)
    @rule(
        reports=st.sampled_from(REPORTS),
        number=st.integers(2, 60),
        aborted=st.none() | st.integers(0, 30),
    )
    def steps_and_an_abort(self, reports, number, aborted):
        self.simulation.reports = reports
        for _ in range(number):
            self.simulation.step()
        if self.live and aborted is not None:
            self.simulation.abort(self.live[aborted % len(self.live)])
            self.counts["aborts"] += 1
            self.simulation.check()

    @rule(everybody=st.booleans())
    def reset_prefix_cache(self, everybody):
        done = self.simulation.reset_prefix_cache(everybody)
        assert done or not everybody
        self.counts["resets"] += done
        self.simulation.check()

    @precondition(lambda self: len(self.live) > 4)
    @rule()
    def drain(self):
        self.simulation.drain()
        self.simulation.check_empty()

    def teardown(self):
        if not self.simulation.sound:
            return  # what follows from it says less than what was wrong
        self.simulation.drain()
        self.simulation.check_empty()
        self.counts.update(self.simulation.worker.counts)
        for arrival in self.simulation.arrivals.values():
            if not arrival.aborted:
                asked = arrival.request.max_tokens
                self.counts["stops"] += len(arrival.answer) < asked
                self.counts["answers"] += 1


def run_traffic(folder, engine, chosen=SETTINGS):
    """Examples of traffic through an engine; what happened in them."""
    counts = Counter()
    layer_groups, window_groups, blocks_per_group, priority, asynchronous = engine
    num_blocks = blocks_per_group * (layer_groups + window_groups) + 1
    make = partial(
        SchedulerOverMemory,
        folder,
        num_blocks,
        layer_groups,
        asynchronous,
        priority,
        window_groups,
    )

    def traffic():
        return Traffic(make, counts)

    if EXAMPLES is None:  # each engine has its own, the same ones while the sources are
        seed(crc32(repr(engine).encode()))(traffic)
    run_state_machine_as_test(traffic, settings=chosen)
    return counts


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(
    ("layer_groups", "window_groups", "blocks_per_group", "priority"),
    [
        (1, 0, 40, False),
        (1, 0, 34, True),
        (2, 0, 40, True),
        (2, 0, 34, False),
        (4, 0, 40, False),
        (4, 0, 34, True),
        (1, 1, 34, False),
        (1, 3, 34, True),
        (2, 2, 40, False),
    ],
)
def test_whatever_happens_blocks_and_answers_are_right(
    layer_groups, window_groups, blocks_per_group, priority, asynchronous, tiny_config
):
    engine = layer_groups, window_groups, blocks_per_group, priority, asynchronous
    counts = run_traffic(tiny_config, engine)
    for kind in KINDS:
        assert counts[kind], f"no {kind}: this case tests less than it says"


def no_copy(patch):
    """A worker does not make the copies that it was told to."""
    patch.setattr(Memory, "copy", lambda memory, block, copy: None)


def packed_where_shared(patch):
    """A request packs into blocks that others hold, or that the cache offers."""

    def own(manager, request_id, positions):
        return [manager.req_to_blocks[request_id][i].block_id for i in positions]

    patch.setattr(EvictableManager, "_own", own)


def hashed_after_eviction(patch):
    """What saw an evicted cache is offered as if it had seen all."""
    patch.setattr(PrefixSharing, "first_eviction", lambda sharing, name, num_tokens: None)


def shared_while_scored(patch):
    """A request that gathers attention takes blocks that others hold."""
    patch.setattr(EvictableManager, "_holds_alone", lambda manager, request_id: False)


def judged_unseen(patch):
    """A block is judged by the score of its former owner: its own has not come."""
    patch.setattr(RequestState, "num_scored_tokens", 10**6)


def judged_in_flight(patch):
    """Blocks are evicted that a step in flight still reads."""
    decide = Ledger.decide

    def early(ledger, request_id, group, num_processed_tokens, blocks, own=None):
        return decide(ledger, request_id, group, num_processed_tokens + 64, blocks, own)

    patch.setattr(Ledger, "decide", early)


def scores_of_a_former_life(patch):
    """What was scored before a preemption counts after it."""

    def restart(table, row):
        table.seen[row] = table.evicted[row] = 0

    patch.setattr(RequestTable, "restart", restart)


def plans_outlive_their_blocks(patch):
    """What was planned for a request that is preempted in the same pass is sent all the same."""
    patch.setattr(Ledger, "_drop_plans", lambda ledger, request_id: None)


def no_sink(patch):
    """The first block goes too."""
    retain = LiveBlocks.retain
    patch.setattr(LiveBlocks, "retain", lambda live, kept: retain(live, kept[1:]))


def asked_too_late(patch):
    """A request is not looked at although it exceeds its budget."""
    decide = Ledger.decide

    def late(ledger, request_id, group, *args):
        evicted = decide(ledger, request_id, group, *args)
        due = ledger.requests[request_id].due
        due[group] = min(NEVER, due[group] + 2 * BLOCK_SIZE) if due[group] else 0
        return evicted

    patch.setattr(Ledger, "decide", late)


def nothing_goes(patch):
    """Nobody is ever evicted."""
    patch.setattr(Ledger, "decide", lambda *args: [])


def a_leak(patch):
    """Of blocks that are given back, one is not."""
    free = BlockPool.free_blocks
    patch.setattr(BlockPool, "free_blocks", lambda pool, blocks: free(pool, list(blocks)[1:]))


def freed_twice(patch):
    """A victim is given back, and stays in its request's table."""
    remove = EvictableManager.remove_skipped_blocks

    def keep(manager, request_id, *args, **options):
        before = list(manager.req_to_blocks.get(request_id, ()))
        remove(manager, request_id, *args, **options)
        if before:
            manager.req_to_blocks[request_id][:] = before

    patch.setattr(EvictableManager, "remove_skipped_blocks", keep)


def waits(patch):
    """A request waits for a block that nobody computes."""
    patch.setattr(PrefixSharing, "is_expected", lambda sharing, block_hash, step: True)


def remembered(patch):
    """What a request evicted from is known after its end."""
    patch.setattr(PrefixSharing, "forget", lambda sharing, request_id: None)


SYNC, ASYNC, PRIORITY = (
    (1, 0, 34, False, False),
    (1, 0, 34, False, True),
    (1, 0, 20, True, False),
)
FAULTS = {
    no_copy: (SYNC, "other contents|another's scores"),
    packed_where_shared: (SYNC, "packs into block .*, which others hold|, which has a hash"),
    hashed_after_eviction: (SYNC, "is hashed as another"),
    shared_while_scored: (SYNC, "has the scores of two requests|another's scores"),
    judged_unseen: (SYNC, "judged before its last token was known"),
    judged_in_flight: (ASYNC, "judged before its last token was known"),
    scores_of_a_former_life: (SYNC, "before its last token was known|blocks that it lost"),
    plans_outlive_their_blocks: (PRIORITY, "which lost its blocks"),
    no_sink: (SYNC, "lost its first block"),
    asked_too_late: (SYNC, r"keeps \d+ of \d+ blocks"),
    nothing_goes: (SYNC, "blocks are known, 0 judged"),
    a_leak: (SYNC, "free and used blocks are not all|references, 0 holders"),
    freed_twice: (SYNC, "references, . holders|and it is held"),
    waits: (ASYNC, "wait for ever"),
    remembered: (SYNC, "an ended request is remembered"),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_noticed(fault, tiny_config, monkeypatch):
    """By the first example that meets it, and which comes first depends on what is imported:
    a rare one is to be met all the same."""
    fault(monkeypatch)
    engine, sentence = FAULTS[fault]
    chosen = settings(SETTINGS, max_examples=500, phases=[Phase.generate])
    with pytest.raises(AssertionError, match=sentence):
        run_traffic(tiny_config, engine, chosen)
