"""What holds at every step of vLLM's scheduler with our connector, whoever asks for what.

The numbers that it is compared with are the simulation's own: which tokens are processed, and
which of them the delivered scores include.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from vllm.v1.request import RequestStatus

from vllm_plugins.attention.compaction import NULL_BLOCK
from vllm_plugins.manager import EvictableManager
from vllm_plugins.policies import BLOCK_SCORES
from vllm_plugins.request_state import NEVER

from .simulated_worker import BLOCK_SIZE

if TYPE_CHECKING:
    from .simulated_scheduler import SchedulerOverMemory


def evicting(simulation: SchedulerOverMemory) -> list[EvictableManager]:
    """The managers of the layer groups, in order."""
    return [m for m in simulation.managers if isinstance(m, EvictableManager)]


def check_plan(simulation: SchedulerOverMemory, output: Any) -> None:
    """Of a step that was scheduled, before it is executed."""
    plan = output.kv_connector_metadata
    requests = simulation.scheduler.requests
    for name in {*plan.evicted, *plan.packs, *plan.takeovers}:
        runs = name in requests and requests[name].status == RequestStatus.RUNNING
        assert runs, f"a plan for {name}, which lost its blocks"
    for name, packs in plan.packs.items():
        for pack in packs:
            _check_pack(simulation, name, pack)
    for name in requests:
        for group in range(plan.num_groups):
            evicted = plan.evicted.get(name, {}).get(group, [])
            _check_table(simulation, name, group, evicted)
            if name in output.num_scheduled_tokens:
                _check_budget(simulation, name, group, evicted)


def _check_pack(simulation: SchedulerOverMemory, name: str, pack: Any) -> None:
    """What stays is written into, so it is the request's alone."""
    table = {b.block_id: b for b in evicting(simulation)[pack.group].req_to_blocks[name]}
    for block_id in pack.block_ids[: pack.num_kept_blocks]:
        assert block_id in table, f"{name} packs into block {block_id}, which it does not hold"
        block = table[block_id]
        assert block.ref_cnt == 1, f"{name} packs into block {block_id}, which others hold"
        assert block.block_hash is None, f"{name} packs into block {block_id}, which has a hash"


def _check_table(
    simulation: SchedulerOverMemory, name: str, group: int, evicted: list[int]
) -> None:
    """The table has the ledger's live blocks. What is protected is there, and nothing went whose
    tokens are not processed, or not scored where scores decide."""
    state = simulation.scheduler.connector.ledger.requests[name]
    live = state.groups[group]
    table = [b.block_id for b in evicting(simulation)[group].req_to_blocks.get(name, ())]
    held = {place: block for place, block in enumerate(table[: live.num_seen]) if block}
    known = dict(zip(live.positions.tolist(), live.block_ids.tolist(), strict=True))
    assert held == known, f"{name}, group {group}: other blocks are held than are live"
    assert NULL_BLOCK not in table[live.num_seen :], f"{name} lost a block that was not decided on"
    assert 0 not in evicted, f"{name} lost its first block, which is a sink"
    assert live.num_seen * BLOCK_SIZE <= _known_tokens(simulation, name), (
        f"{name}: a block was judged before its last token was known"
    )
    if live.num_seen:
        assert live.positions[-1] == live.num_seen - 1, f"{name} lost its newest block"
    if evicted and state.settings.rule is not None:
        recent = state.settings.rule.num_recent(len(live.positions))
        assert max(evicted) < live.positions[-recent], f"{name} lost a recent block"
    assert live.graph_rows.keys() <= set(table), f"{name} remembers blocks that it lost"


def _known_tokens(simulation: SchedulerOverMemory, name: str) -> int:
    """Tokens whose blocks may be judged."""
    life = name, simulation.scheduler.requests[name].num_preemptions
    tokens = simulation.processed.get(life, 0)
    if simulation.scheduler.connector.ledger.requests[name].settings.needs & BLOCK_SCORES:
        tokens = min(tokens, simulation.scored.get(life, 0))
    return tokens


def _check_budget(
    simulation: SchedulerOverMemory, name: str, group: int, evicted: list[int]
) -> None:
    """A request keeps its budget and the slack, and what is not known yet; and no less."""
    ledger = simulation.scheduler.connector.ledger
    state = ledger.requests[name]
    if state.due[group] == NEVER:
        assert not state.groups[group].num_evicted, f"{name} evicts nothing"
        return
    known = _known_tokens(simulation, name) // BLOCK_SIZE
    live, num_live = state.groups[group], len(state.groups[group].positions)
    keep = state.settings.keep(state.num_tokens, BLOCK_SIZE, ledger.config.min_blocks)
    slack = ledger.config.slack(BLOCK_SIZE) if state.settings.rule is not None else 0
    if evicted:
        assert num_live == keep, f"{name} keeps {num_live} blocks of a budget of {keep}"
    if name in simulation.starting:
        return
    # What cannot exceed the budget yet is not judged; it is held all the same.
    num_held = num_live + known - live.num_seen
    no_memory = state.due[group] == 0  # for copies of what it shares: it is asked again
    all_judged = live.num_seen == known
    assert all_judged or not no_memory, f"{name}: {known} blocks are known, {live.num_seen} judged"
    assert num_held <= keep + slack or no_memory, f"{name} keeps {num_held} of {keep} blocks"


def check_blocks(simulation: SchedulerOverMemory) -> None:
    """Between steps. References are counted anew, by tables and by what waits for steps in flight.

    A block is shared only where the cache offers it, and no two requests add scores to it.
    """
    scheduler, pool = simulation.scheduler, simulation.pool
    ledger = scheduler.connector.ledger
    assert ledger.requests.keys() == scheduler.requests.keys(), "another's state is remembered"
    plans = {*ledger._pending, *ledger._packs, *ledger._takeovers}
    assert not plans, f"a plan for {plans} waits for the next step"
    holders: Counter[int] = Counter()
    gathering: Counter[int] = Counter()
    for manager in simulation.managers:
        for name, blocks in manager.req_to_blocks.items():
            ids = [block.block_id for block in blocks if not block.is_null]
            holders.update(ids)
            if isinstance(manager, EvictableManager) and ledger.gathers_attention(name):
                gathering.update(ids)
    leaving = Counter(b.block_id for _, blocks in scheduler.deferred_frees for b in blocks)
    leaving.pop(NULL_BLOCK, None)
    free = pool.free_block_queue.get_all_free_blocks()
    assert len(free) == pool.get_num_free_blocks()
    used = {*holders, *leaving}
    assert len(free) + len(used) == pool.num_gpu_blocks - 1, "free and used blocks are not all"
    assert used.isdisjoint(block.block_id for block in free), "a used block is free"
    assert not any(block.ref_cnt for block in free), "a free block is referenced"
    for number in used:
        block, references = pool.blocks[number], holders[number] + leaving[number]
        assert block.ref_cnt == references, f"block {number} is not referenced by who holds it"
        assert holders[number] < 2 or block.block_hash, f"block {number} is shared without a hash"
        assert gathering[number] < 2, f"block {number} has the scores of two requests"
    for block in pool.blocks:
        if (block_hash := block.block_hash) is not None:
            offered = pool.cached_block_hash_to_block.contain(block_hash, block.block_id)
            assert offered, f"block {block.block_id} has a hash that the cache does not know"


def check_at_rest(simulation: SchedulerOverMemory) -> None:
    """All requests have ended: all blocks are free, and nobody is remembered."""
    ledger = simulation.scheduler.connector.ledger
    simulation.check()
    assert simulation.pool.get_num_free_blocks() == simulation.pool.num_gpu_blocks - 1
    remembered = [ledger.requests, ledger.sharing._exact]
    for manager in simulation.managers:
        remembered += [manager.req_to_blocks, manager.num_cached_block]
        if isinstance(manager, EvictableManager):
            remembered += [manager._unhashed, manager._taken]
    assert not any(remembered), f"an ended request is remembered: {[*filter(None, remembered)]}"
