"""Sliding-window layers beside layers that evict: vLLM's own, but for what their blocks may share.

Importing this module registers the spec. vLLM finds a manager by the type of a spec
(``vllm/v1/kv_cache_spec_registry.py``).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import (
    SlidingWindowManager,
    register_all_kvcache_specs,
)
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from .conservation import CountedManager
from .ledger import Ledger
from .prefix_sharing import OWN_QUERIES


class WindowManager(CountedManager, SlidingWindowManager):
    """``SlidingWindowManager``, which frees what its window has passed, and nothing else.

    A windowed layer computes from the output of the layers before it. So what it computes after a
    request's first eviction is the request's alone, as it is in the layers that evict.
    """

    def attach(self, ledger: Ledger) -> None:
        """From now on only what ``ledger`` calls exact may be shared."""
        self._ledger = ledger

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **options: Any) -> None:
        """As vLLM's, up to the request's first eviction.

        vLLM keeps a window where a prompt could be taken up again. Where attention is gathered it
        is taken up ``OWN_QUERIES`` earlier (``EvictableManager.find_longest_cache_hit``).
        """
        if self._ledger is not None:
            num_tokens = min(num_tokens, self._ledger.sharing.num_exact(request.request_id))
        ours = max(0, request.num_prompt_tokens - OWN_QUERIES)
        boundaries = [*options.pop("replay_boundaries"), ours]
        super().cache_blocks(request, num_tokens, *args, replay_boundaries=boundaries, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowSpec(SlidingWindowSpec):
    """``SlidingWindowSpec`` whose manager is ``WindowManager``: its memory is planned as vLLM's."""


# Registering into an empty registry would stop vLLM's lazy registration of its own specs.
register_all_kvcache_specs(None)
KVCacheSpecRegistry.register(
    WindowSpec, manager_class=WindowManager, uniform_type_base_spec=SlidingWindowSpec
)
