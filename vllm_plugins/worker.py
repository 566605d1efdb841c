"""Worker side: evictable specs out, nulls in. What both platforms' workers share.

The model runners themselves are known to ``worker_cpu.py`` (V1) and ``worker_cuda.py`` (V2) only.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.kv_transfer import (
    ensure_kv_transfer_shutdown,
    get_kv_transfer_group,
    has_kv_transfer_group,
)

from .attention.compaction import NULL_BLOCK
from .attention.packing import Packer
from .attention.state import WorkerState, begin, end, worker_state
from .attention.token_scores import bytes_per_token
from .config import EvictionConfig
from .messages import EvictionPlan
from .packs import Pack
from .parsing import EvictionConfigError
from .policies import TOKEN_NEEDS
from .prefix_sharing import Copy
from .refusals.engine import check_engine
from .registration import CONNECTOR
from .request_settings import TOKEN
from .spec import EvictableSpec, evictable_specs, layer_groups

if TYPE_CHECKING:
    from vllm.v1.worker.worker_base import WorkerBase as _Worker
else:
    _Worker = object

Changes = Mapping[str, Mapping[int, Mapping[int, int]]]
"""``{request_id: {KV-cache group: {position: block}}}``, entries of block tables."""


def evictable(specs: Mapping[str, Any], max_model_len: int) -> dict[str, Any]:
    """A model runner's specs by layer; those of layers that evict are split into layer groups."""
    return evictable_specs(specs, worker_state().config.layer_groups, max_model_len)


@dataclass
class Wave:
    """Copies, and packs that can be done at once after them."""

    copies: list[Copy] = field(default_factory=list)
    packs: dict[str, list[Pack]] = field(default_factory=dict)


def waves(plan: EvictionPlan) -> Iterator[Wave]:
    """What the scheduler planned, in its order, in few parts.

    A pack comes after the copies of its own region. A block that one pack reads for the last time
    may be a later one's copy, also in another layer group: the groups share the memory of blocks.
    Requests without a pack are new ones: they came last, and took what was free by then.
    """
    wave, read = Wave(), set[int]()
    for request_id, packs in plan.packs.items():
        takeover = plan.takeovers.get(request_id)
        for pack in packs:
            copies = [c for c in takeover.copies if c[0] == pack.group] if takeover else []
            if any(copy in read for _, _, copy in copies):
                yield wave
                wave, read = Wave(), set()
            wave.copies += copies
            wave.packs.setdefault(request_id, []).append(pack)
            read.update(pack.block_ids)
    yield wave
    new = [takeover for name, takeover in plan.takeovers.items() if name not in plan.packs]
    yield Wave([copy for takeover in new for copy in takeover.copies])


def table_changes(plan: EvictionPlan, kv_cache_groups: Sequence[int]) -> Changes:
    """Evicted entries become null, replaced ones the copies.

    Args:
        plan: of the step.
        kv_cache_groups: vLLM's number of each layer group.

    """
    changes: dict[str, dict[int, dict[int, int]]] = {}
    for request_id, groups in plan.evicted.items():
        for group, nulls in groups.items():
            table = changes.setdefault(request_id, {}).setdefault(kv_cache_groups[group], {})
            table.update(dict.fromkeys(nulls, NULL_BLOCK))
    for request_id, takeover in plan.takeovers.items():
        for group, blocks in takeover.replaced.items():
            table = changes.setdefault(request_id, {}).setdefault(kv_cache_groups[group], {})
            table.update(blocks)
    return changes


_running: weakref.ref[Any] | None = None
"""This process's worker, from the end of its start to its shutdown."""


def _check_alone() -> None:
    """Refuse a second engine in one process.

    vLLM keeps one connector a process (``kv_transfer_state.py``): two engines would share its
    worker side, and the first one's evictions would stop without a word. A start that failed
    leaves its connector behind, which is nobody's.

    Raises:
        EvictionConfigError: an engine with a connector runs here already.

    """
    if not has_kv_transfer_group():
        return
    ours = type(get_kv_transfer_group()).__name__ == CONNECTOR
    if ours and (_running is None or _running() is None):
        ensure_kv_transfer_shutdown()
        return
    raise EvictionConfigError(
        "another engine with a KV connector runs in this process, and vLLM keeps one connector "
        "a process; end it first (llm.llm_engine.engine_core.shutdown()), or let vLLM give "
        "each engine a process of its own (VLLM_ENABLE_V1_MULTIPROCESSING=1, its default)"
    )


class EvictionWorkerMixin(_Worker):
    """Over the platform's worker class (``worker_cls``)."""

    state_class: type[WorkerState]
    eviction: WorkerState
    model_runner: Any
    _packer: Packer | None = None

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        # Before the weights are loaded: what cannot work should not take that long to say so.
        check_engine(vllm_config)
        _check_alone()
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        self.eviction = begin(self.state_class(EvictionConfig.parse(extra)))
        self.register_attention()
        super().__init__(vllm_config, *args, **kwargs)

    @staticmethod
    def register_attention() -> None:
        """Make the eviction backend known to vLLM; called before the model is built."""
        raise NotImplementedError

    def change_tables(self, changes: Changes) -> None:
        """Write entries of the model runner's block tables, and tell ``eviction`` whose rows they
        are; called before each step."""
        raise NotImplementedError

    def new_packer(self) -> Packer:
        """What packs this engine's requests; called when the first one is due."""
        raise NotImplementedError

    def packer_arguments(self) -> dict[str, Any]:
        """Of ``Packer``, whatever the platform."""
        state, ranks = self.eviction, self.vllm_config.parallel_config.tensor_parallel_size
        num_local = state.tokens.position.shape[2]
        # With more ranks than KV heads several ranks hold the same one.
        replicas = max(1, ranks // self.model_config.get_total_num_kv_heads())
        return {
            "kv_caches": state.kv_caches,
            "groups": state.layers_of,
            "tokens": state.tokens,
            "scoring": state.config.score_at(TOKEN),
            "sink_tokens": state.config.sink_tokens,
            "first_head": get_tensor_model_parallel_rank() // replicas * num_local,
            "num_heads": num_local * ranks // replicas,
        }

    def pack(self, packs: Mapping[str, Sequence[Pack]]) -> None:
        """Move every head's best tokens into the blocks that stay; called before the nulls are
        written, so before anything else is written into the blocks that go."""
        if packs:
            if self._packer is None:
                self._packer = self.new_packer()
            self.eviction.pack_failures |= self._packer.pack(packs)

    def _prepare_blocks(self, plan: EvictionPlan) -> None:
        """Copies, packs and adopted blocks."""
        for wave in waves(plan):
            self.eviction.copy_blocks(wave.copies)
            self.pack(wave.packs)
        self.eviction.adopt(plan.takeovers.values())

    def determine_available_memory(self) -> int:
        """Bytes for keys and values: what vLLM finds, less what the tokens' scores will take."""
        available = super().determine_available_memory()
        per_token = bytes_per_token(self.eviction.server_needs & TOKEN_NEEDS)
        specs = self.get_kv_cache_spec().values()
        spec = next(spec for spec in specs if isinstance(spec, EvictableSpec))
        scores = per_token * spec.num_kv_heads * spec.block_size
        return available * spec.page_size_bytes // (spec.page_size_bytes + scores)

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """As vLLM's; first the state learns which layers evict, as builders ask for it."""
        self.eviction.set_layers(layer_groups(kv_cache_config))
        super().initialize_from_config(kv_cache_config)

    def compile_or_warm_up_model(self) -> Any:
        """The last part of a start."""
        global _running
        warmed_up = super().compile_or_warm_up_model()
        _running = weakref.ref(self)
        return warmed_up

    def shutdown(self) -> None:
        """The engine ends; another one may start in this process."""
        global _running
        _running = None
        end()
        self._packer = None
        self.eviction.release()
        super().shutdown()

    def execute_model(self, scheduler_output: Any) -> Any:
        """Apply the step's evictions, then run the step."""
        plan = scheduler_output.kv_connector_metadata
        if isinstance(plan, EvictionPlan):
            self.eviction.start_step(plan, scheduler_output.finished_req_ids)
            self._prepare_blocks(plan)
            self.change_tables(table_changes(plan, self.eviction.kv_cache_groups))
        return super().execute_model(scheduler_output)
