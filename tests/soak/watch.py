"""What must hold of an engine at every step and at rest, and what is counted meanwhile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm_plugins.attention.state import worker_state

from ..engine.conftest import connector_of


class Watch:
    """An in-process engine, looked into from outside.

    Attributes:
        counts: steps, and what the plans of all steps asked for, by kind.

    """

    def __init__(self, llm: Any) -> None:
        core = llm.llm_engine.engine_core.engine_core
        self._engine = llm.llm_engine
        self._scheduler = core.scheduler
        self._runner = core.model_executor.driver_worker.worker.model_runner
        self._connector = connector_of(llm)
        self.counts: Counter[str] = Counter()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Every step that is scheduled meanwhile is counted."""
        schedule = self._scheduler.schedule

        def counted(*arguments: Any, **options: Any) -> Any:
            output = schedule(*arguments, **options)
            self._count(output)
            return output

        self._scheduler.schedule = counted
        try:
            yield
        finally:
            self._scheduler.schedule = schedule

    def _count(self, output: Any) -> None:
        plan, cached = output.kv_connector_metadata, output.scheduled_cached_reqs
        computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        starts = [new.num_computed_tokens for new in output.scheduled_new_reqs]
        starts += [computed[name] for name in cached.resumed_req_ids]
        evicted = [blocks for groups in plan.evicted.values() for blocks in groups.values()]
        copies = [takeover.copies for takeover in plan.takeovers.values()]
        self.counts.update(
            {
                "steps": 1,
                "tokens_computed": output.total_num_scheduled_tokens,
                "preemptions": len(output.preempted_req_ids or ()),
                "prefix_hits": sum(start > 0 for start in starts),
                "cached_tokens": sum(starts),
                "blocks_evicted": sum(map(len, evicted)),
                "packs": sum(map(len, plan.packs.values())),
                "copies": sum(map(len, copies)),
            }
        )

    def check_tables(self) -> None:
        """The worker has the scheduler's block table of every running request, row and all.

        Raises:
            AssertionError: of which request and layer group it has not.

        """
        batch = self._runner.input_batch
        managers = self._scheduler.kv_cache_manager.coordinator.single_type_managers
        for request in self._scheduler.running:
            name = request.request_id
            row = batch.req_id_to_index.get(name)
            for group, manager in enumerate(managers):
                table = [block.block_id for block in manager.req_to_blocks[name]]
                assert self._runner.requests[name].block_ids[group] == table, (name, group)
                if row is not None:
                    held = batch.block_table[group].block_table.np[row, : len(table)]
                    assert held.tolist() == table, f"{name}, group {group}: another row"

    def rest(self) -> None:
        """Let the worker hear of the last requests that ended.

        Raises:
            AssertionError: a block is leaked, or somebody remembers a request.

        """
        while self._scheduler.has_requests():
            self._engine.step()
        leaked, left = self.leaked_blocks(), {k: n for k, n in self.remembered().items() if n}
        assert not leaked, f"{leaked} blocks are leaked"
        assert not left, f"at rest something is left: {left}"

    def leaked_blocks(self) -> int:
        """Blocks that are not free; of an engine at rest."""
        pool = self._connector._pool
        return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()

    def remembered(self) -> dict[str, int]:
        """Entries in what the plug-in keeps by request, on both sides: at rest there are none."""
        ledger, worker = self._connector.ledger, worker_state()
        table = ledger.table
        sizes = {
            "ledger.requests": len(ledger.requests),
            "ledger.plans": len(ledger._pending) + len(ledger._packs) + len(ledger._takeovers),
            "table.rows": len(table._life) - len(table._free),
            "table.under_way": len(table._under_way),
            "sharing.exact": len(ledger.sharing._exact),
            "worker.needs": len(worker.needs) + len(worker.windows),
            "worker.pack_failures": len(worker.pack_failures),
            "runner.requests": len(self._runner.requests),
        }
        self._connector.check_integrity()
        sizes["leaving"] = len(self._connector.conservation.leaving)
        for group, manager in enumerate(self._connector._managers):
            kept = (manager.req_to_blocks, manager.num_cached_block, manager._unhashed)
            sizes[f"manager.{group}"] = sum(map(len, (*kept, manager._taken)))
        return sizes
