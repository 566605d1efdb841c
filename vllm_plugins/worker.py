"""Worker side: evictable specs out, nulls in. The one place that knows the model runner.

Private state of vLLM 0.32.0 that is touched here, all of it in ``apply_evictions`` and
``_input_batch``: ``runner.requests[id].block_ids``, ``runner.input_batch.req_id_to_index``,
``.req_ids`` and ``.block_table[group].block_table.np`` (V1 runner, which the CPU uses).
"""

from __future__ import annotations

from typing import Any

from .attention.compaction import NULL_BLOCK
from .attention.state import begin
from .config import EvictionConfig
from .messages import EvictionPlan
from .spec import evictable_specs


def apply_evictions(runner: Any, evicted: dict[str, dict[int, list[int]]]) -> None:
    """Null the evicted entries of the runner's block tables (V1 runner).

    Both the cached state of a request (which refills a row that left the batch) and the row
    itself are written; the row reaches the attention metadata in this same step.
    """
    for request_id, groups in evicted.items():
        request = runner.requests.get(request_id)
        if request is None:
            continue
        row = runner.input_batch.req_id_to_index.get(request_id)
        for group, positions in groups.items():
            block_ids = request.block_ids[group]
            for position in positions:
                block_ids[position] = NULL_BLOCK
            if row is not None:
                table = runner.input_batch.block_table[group].block_table.np
                table[row, positions] = NULL_BLOCK


class EvictionWorkerMixin:
    """Over the platform's worker class (``worker_cls``)."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        self.eviction = begin(EvictionConfig.parse(extra))
        self.register_attention()
        super().__init__(vllm_config, *args, **kwargs)

    @staticmethod
    def register_attention() -> None:
        """Put the eviction backend in the place of the platform's; called before model load."""
        raise NotImplementedError

    def get_kv_cache_spec(self) -> dict[str, Any]:
        """Specs by layer, evictable and split into layer groups."""
        specs = super().get_kv_cache_spec()
        evictable = evictable_specs(specs, self.eviction.config.layer_groups)
        self.eviction.set_layers({name: spec.layer_group for name, spec in evictable.items()})
        return evictable

    def execute_model(self, scheduler_output: Any) -> Any:
        """Apply the step's evictions, then run the step."""
        plan = scheduler_output.kv_connector_metadata
        if isinstance(plan, EvictionPlan):
            runner = self.model_runner
            self.eviction.input_batch = runner.input_batch
            self.eviction.start_step(plan, scheduler_output.finished_req_ids)
            apply_evictions(runner, plan.evicted)
        return super().execute_model(scheduler_output)
