"""Worker-side state: what the requests of a step need, and which layers gather it.

One per worker process and engine. The worker makes it (``begin``), attention layers pick it up
while the model is built, the connector reports from it. Where scores lie, and how they reach the
scheduler, differs by platform: ``state_cpu.py``, ``state_cuda.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.utils.torch_utils import async_tensor_h2d

from ..config import EvictionConfig
from ..messages import EvictionPlan, ScoreReport
from ..parsing import EvictionConfigError
from ..platforms import platform
from ..policies import BLOCK_SCORES, TOKEN_NEEDS
from ..prefix_sharing import Copy, Takeover
from ..refusals.engine import SENTENCES, check_kv_cache_dtype, is_configured
from .token_scores import TokenScores

BLOCKS_AT_ONCE = 512
"""Copied together; of a layer they take this many blocks of memory for a moment."""
State = TypeVar("State", bound="WorkerState")
_state: WorkerState | None = None


def begin(state: State) -> State:
    """From now on ``state`` is that of this process's engine."""
    global _state
    _state = state
    return state


def end() -> None:
    """The engine of this process has ended."""
    global _state
    _state = None


def worker_state() -> WorkerState:
    """The state of this process's engine.

    Raises:
        EvictionConfigError: its worker is not ours.

    """
    if _state is None:
        raise EvictionConfigError(SENTENCES["worker"])
    return _state


def builder_state(vllm_config: Any, kind: type[State]) -> State | None:
    """What a metadata builder works with; None where eviction is not configured.

    Args:
        vllm_config: ``vllm.config.VllmConfig``, or None.
        kind: the platform's class of state.

    """
    if not is_configured(vllm_config):
        return None
    state = worker_state()
    assert isinstance(state, kind), f"{type(state).__name__} under a backend for {kind.__name__}"
    return state


def attention_state(impl: Any, kind: type[State]) -> State | None:
    """What an attention implementation works with; None where eviction is not configured.

    Raises:
        EvictionConfigError: its attention is more than a softmax of scaled products, or its cache
            has a type that this platform's kernels do not read (the checkpoint's, which no setting
            of the engine shows).

    """
    state = builder_state(get_current_vllm_config_or_none(), kind)
    if state is None:
        return None
    check_kv_cache_dtype(impl.kv_cache_dtype)
    if impl.alibi_slopes is not None:
        raise EvictionConfigError(
            "the model uses ALiBi, which the scores do not know; use a model with rotary positions"
        )
    return state


class WorkerState(ABC):
    """Needs of all requests, roles of all layers, and the number of the step.

    ``mass``, ``num_queries``, ``norm``: one number per physical block, ``[num_blocks]``; a block's
    numbers start at zero when its first token is written. ``first_layers`` and ``scored_layers``
    name layers: the first of each layer group, and those whose attention is scored. ``tokens``:
    scores of single tokens; ``layers_of`` a group are its layers in order, and ``layer_places``
    says which of them a layer is. Layers with a sliding window are none of these.
    ``kv_cache_groups``: vLLM's number of each layer group. ``pack_failures``: request to the reason
    why its policy was not followed, not reported yet. ``active``: whether any block's
    score is kept at all just now.
    """

    def __init__(self, config: EvictionConfig) -> None:
        self.config = config
        self.decay = 0.5 ** (1.0 / config.score_half_life) if config.score == "decay" else 1.0
        self.window = None if config.score_queries == "all" else int(config.score_queries)
        self.server_needs = config.needs() & platform().gathers
        self.group_of: dict[str, int] = {}
        self.first_layers: frozenset[str] = frozenset()
        self.scored_layers: frozenset[str] = frozenset()
        self.step = 0
        self.needs: dict[str, frozenset[str]] = {}
        self.active = False
        self.windows: dict[str, int] = {}
        self.mass = self.num_queries = self.norm = torch.empty(0)
        self.kv_caches: dict[str, torch.Tensor] = {}
        self.pack_failures: dict[str, str] = {}
        self.layers_of: list[list[str]] = []
        self.kv_cache_groups: list[int] = []
        self.layer_places: dict[str, int] = {}
        self.tokens = TokenScores(0, (0, 0, 0), frozenset(), torch.device("cpu"))

    @abstractmethod
    def allocate(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Room for the scores of all physical blocks. Called again, it starts afresh.

        Args:
            kv_caches: layer name to ``[num_blocks, num_kv_heads, block_size, 2 * head_size]``.

        """

    def register(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """The caches that the engine will run with are there."""
        self.kv_caches = {name: kv_caches[name] for name in self.group_of}
        self.allocate(self.kv_caches)

    def release(self) -> None:
        """The engine ends: hold on to no cache, so that its memory is free for another one."""
        self.kv_caches = {}
        self.mass = self.num_queries = self.norm = torch.empty(0)
        self.tokens = TokenScores(0, (0, 0, 0), frozenset(), torch.device("cpu"))

    @abstractmethod
    def report(self) -> ScoreReport | None:
        """What the scheduler learns after this step; None while nobody needs scores."""

    def set_layers(self, groups: Mapping[int, Sequence[str]]) -> None:
        """The layers that evict.

        Args:
            groups: vLLM's KV-cache group of each layer group, to its layers in order of execution.

        """
        self.kv_cache_groups = list(groups)
        layers = self.layers_of = [list(names) for names in groups.values()]
        self.group_of = {name: group for group, names in enumerate(layers) for name in names}
        self.first_layers = frozenset(names[0] for names in layers)
        stride = self.config.score_layer_stride
        self.scored_layers = frozenset(name for names in layers for name in names[::stride])
        self.layer_places = {name: i for names in layers for i, name in enumerate(names)}

    def new_token_scores(self, kv_caches: Mapping[str, torch.Tensor]) -> TokenScores:
        """Scores of single tokens for these caches; of no size where no request can use them.

        Raises:
            EvictionConfigError: the layers' caches differ.

        """
        needs = self.server_needs & TOKEN_NEEDS
        cache = next(iter(kv_caches.values()))
        if needs and len({(c.shape[1:], c.stride()) for c in kv_caches.values()}) > 1:
            raise EvictionConfigError(
                "the model's layers differ in KV heads or head size, which token granularity does "
                'not know; start with granularity "block" and request_granularity "server"'
            )
        num_layers = max(map(len, self.layers_of)) if needs else 0
        return TokenScores(num_layers, tuple(cache.shape[:3]), needs, cache.device)

    def start_step(self, plan: EvictionPlan, finished: set[str]) -> None:
        """A step begins: note its number and what its requests need."""
        self.step = plan.step
        for request_id in finished:
            self.needs.pop(request_id, None)
            self.windows.pop(request_id, None)
        self.needs.update(plan.needs)
        self.windows.update(plan.windows)
        if finished or plan.needs:
            self.active = any(needs & BLOCK_SCORES for needs in self.needs.values())

    def copy_blocks(self, copies: Iterable[Copy]) -> None:
        """Copy blocks with all that belongs to them, as if one after the other."""
        pending: list[Copy] = []
        blocks: set[int] = set()
        targets: set[int] = set()
        for copy in copies:
            _, source, target = copy
            # At once every copy reads before any is written, and in any order of layer groups.
            if target in blocks or source in targets or len(pending) == BLOCKS_AT_ONCE:
                self._copy_at_once(pending)
                pending, blocks, targets = [], set(), set()
            pending.append(copy)
            blocks.update((source, target))
            targets.add(target)
        self._copy_at_once(pending)

    def _copy_at_once(self, copies: Iterable[Copy]) -> None:
        by_group: dict[int, list[tuple[int, int]]] = {}
        for group, block, copy in copies:
            by_group.setdefault(group, []).append((block, copy))
        for group, pairs in by_group.items():
            both = async_tensor_h2d(pairs, self.mass.device, torch.int64)
            self._copy(group, both[:, 0], both[:, 1])

    def adopt(self, takeovers: Iterable[Takeover]) -> None:
        """Start the scores of blocks that come from the prefix cache."""
        takeovers = list(takeovers)
        for afresh in (True, False):
            adopted = [pair for t in takeovers if t.starts_afresh is afresh for pair in t.adopted]
            if adopted:
                pairs = async_tensor_h2d(adopted, self.mass.device, torch.int64)
                self._adopt(pairs[:, 0], pairs[:, 1], afresh)

    def _copy(self, group: int, source: torch.Tensor, target: torch.Tensor) -> None:
        for name in self.layers_of[group]:
            cache = self.kv_caches[name]
            cache[target] = cache[source]
        for array in self.tokens.arrays().values():
            array[:, target] = array[:, source]
        for numbers in (self.mass, self.num_queries, self.norm):
            numbers[target] = numbers[source]

    def _adopt(self, blocks: torch.Tensor, places: torch.Tensor, afresh: bool) -> None:
        block_size = self.tokens.position.shape[-1]
        first = (places * block_size)[:, None, None]
        if self.tokens.position.numel():
            offsets = torch.arange(block_size, device=blocks.device)
            self.tokens.position[:, blocks] = (first + offsets).int()
        if afresh:
            for scores in (self.tokens.mass, self.tokens.peak):
                if scores.numel():
                    scores[:, blocks] = 0.0
            self.mass[blocks] = self.num_queries[blocks] = 0

    def scores_decode(self, position: Any, window: Any) -> Any:
        """Whether a decode's query at ``position`` is scored (chunks always are); ints or arrays.

        By place in the sequence, not by step: who else is in the batch changes nothing. Of a
        request that looks at its last query alone (``window`` 1) each one is.
        """
        return (position % self.config.score_query_stride == 0) | (window == 1)
