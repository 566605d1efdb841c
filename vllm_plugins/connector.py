"""The KV connector: carries the two messages, admits requests, exports records and metrics.

It moves no KV data; the load and save hooks of the interface do nothing.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from typing import Any
from zlib import crc32

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    SupportsHMA,
)

from .attention.state import worker_state
from .config import EvictionConfig
from .conservation import Conservation
from .ledger import Ledger
from .manager import EvictableManager
from .messages import EvictionPlan, ScoreReport
from .metrics import COUNTERS, ENDED, LIVE_SHARE, EvictionPromMetrics, EvictionStats
from .parsing import EvictionConfigError
from .platforms import check_settings
from .policies import GRAPH, KEY_NORM
from .prefix_sharing import Unscored, always_computed
from .refusals.engine import SENTENCES, check_engine
from .siblings import Siblings
from .startup import engine_lines
from .window import WindowManager

logger = logging.getLogger("vllm.kv_eviction")

RECORD_KEY = "kv_eviction"
"""Key of a request's record in ``RequestOutput.kv_transfer_params``."""


class KVEvictionConnector(KVConnectorBase_V1, SupportsHMA):
    """Scheduler and worker half of the plugin's communication."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.config = EvictionConfig.parse(self._kv_transfer_config.kv_connector_extra_config)
        self._in_flight_tokens = vllm_config.max_in_flight_tokens
        self._block_size = vllm_config.cache_config.block_size
        self._ledger: Ledger | None = None
        self._siblings = Siblings()
        self._reported: Counter[str] = Counter()
        self._reported_by_label: dict[str, Counter[str]] = {}
        self._ended: dict[str, list[float]] = {name: [] for name in ENDED}
        self.scoring_seconds: Counter[str] = Counter()
        self._sharing = bool(vllm_config.cache_config.enable_prefix_caching)
        if role == KVConnectorRole.SCHEDULER:
            check_engine(vllm_config)
            logger.info("KV eviction: %s", self.config.summary(self._sharing))

    # Scheduler side

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        """Join the managers to one ledger: those that evict are its layer groups, in order."""
        super().bind_kv_cache_manager(kv_cache_manager)
        self._pool = kv_cache_manager.block_pool
        self._managers = list(kv_cache_manager.coordinator.single_type_managers)
        evicting = [m for m in self._managers if isinstance(m, EvictableManager)]
        windowed = [m for m in self._managers if isinstance(m, WindowManager)]
        if not evicting or len(evicting) + len(windowed) < len(self._managers):
            raise EvictionConfigError(SENTENCES["worker"])
        # vLLM enlarges or pads the blocks of layers with a smaller cache, until all take as much.
        specs = [manager.kv_cache_spec for manager in evicting]
        if any(s.block_size != self._block_size or s.page_size_padded for s in specs):
            raise EvictionConfigError(SENTENCES["page_sizes"])
        self.conservation = Conservation(self._pool, self._managers)
        ledger = Ledger(
            self.config,
            self._block_size,
            len(evicting),
            self._pool.num_gpu_blocks,
            self._in_flight_tokens,
        )
        self._ledger = ledger
        for group, manager in enumerate(evicting):
            manager.attach(ledger, group)
        for manager in windowed:
            manager.attach(ledger)
        # Only here both the settings and the pool's size are known.
        usable = self._pool.num_gpu_blocks - 1  # one is the null block
        groups = len(evicting), len(windowed)
        for line in engine_lines(self._vllm_config, self.config, usable, *groups):
            logger.info("KV eviction: %s", line)

    @property
    def ledger(self) -> Ledger:
        """The scheduler's bookkeeping; only after ``bind_kv_cache_manager``."""
        assert self._ledger is not None
        return self._ledger

    def on_new_request(self, request: Any) -> None:
        """Settle which settings a request follows.

        Bad ones are refused before they come here (``refusals/requests.py``); on a front end
        without that check the request follows the server's settings, and says so in its record.
        """
        params = request.sampling_params
        extra = params.extra_args if params is not None else None
        refused = None
        try:
            settings = self.config.request_settings(extra, self.ledger.block_size)
            check_settings(settings)
        except EvictionConfigError as error:
            refused = str(error)
            settings = self.config.request_settings(None, self.ledger.block_size)
        if self._is_one_step(request):
            settings = replace(settings, one_step=True)
        if settings.needs & {KEY_NORM, GRAPH}:
            # Gathered by block while it is computed, and for requests that ask for it only.
            request.skip_reading_prefix_cache = True
        tokens = np.asarray(request.prompt_token_ids or (), dtype=np.int64)
        seed = (params.seed if params is not None else None) or 0
        # The prompt, not the request's id, tells requests apart: the same run repeats exactly.
        self.ledger.admit(
            request, settings, crc32(tokens.tobytes(), self.config.seed + seed), refused
        )
        if not self._sharing:
            # Where there is a connector, vLLM hashes every block: another may ask for it by its
            # hash. Nobody does here.
            request._block_hasher = None
        if not settings.gathers_attention:
            request.block_hashes = Unscored(request.block_hashes)

    def _is_one_step(self, request: Any) -> bool:
        """Whether a request may be over after its first step: a beam's, or one for a judgement.

        It holds no more than the tokens of a step in flight, which every request may.
        """
        scheduler = self._vllm_config.scheduler_config
        chunk = scheduler.long_prefill_token_threshold or scheduler.max_num_batched_tokens
        chunk = min(chunk, scheduler.max_num_batched_tokens)
        ends = request.max_tokens == 1 and not request.resumable
        return bool(ends and request.num_prompt_tokens <= chunk)

    def build_connector_meta(self, scheduler_output: Any) -> EvictionPlan:
        """What the workers must know for the step just scheduled."""
        ledger = self.ledger
        scheduled = scheduler_output.num_scheduled_tokens
        cached = scheduler_output.scheduled_cached_reqs
        before = zip(cached.req_ids, cached.num_computed_tokens, strict=True)
        after = {r: tokens + scheduled[r] for r, tokens in before}
        needs, windows = {}, {}
        for new in scheduler_output.scheduled_new_reqs:
            after[new.req_id] = new.num_computed_tokens + scheduled[new.req_id]
            state = ledger.requests.get(new.req_id)
            if state is not None and state.settings.needs:
                needs[new.req_id] = state.settings.needs
                if state.settings.window is not None:
                    windows[new.req_id] = state.settings.window
        used = self._pool.num_gpu_blocks - 1 - self._pool.get_num_free_blocks()
        started = {
            new.req_id: ledger.lost_before(new.req_id)
            for new in scheduler_output.scheduled_new_reqs
        }
        step = ledger.schedule(after, used)
        if self.config.check_integrity:
            self.check_integrity()
        return EvictionPlan(
            step=step,
            evicted=ledger.take_evictions(),
            needs=needs,
            windows=windows,
            started=started,
            num_groups=ledger.num_groups,
            takeovers=ledger.take_takeovers(),
            packs=ledger.take_packs(),
        )

    def check_integrity(self) -> None:
        """Conservation of blocks (``Conservation.check``).

        Raises:
            AssertionError: which equation does not hold.

        """
        self.conservation.check()

    def update_connector_output(self, connector_output: Any) -> None:
        """Take in the workers' report."""
        report = connector_output.kv_connector_worker_meta
        if isinstance(report, ScoreReport):
            self.ledger.observe(report.step, report.resolve(), report.graph)
            for request_id, reason in report.pack_failures.items():
                self.ledger.pack_failed(request_id, reason)
            self.scoring_seconds.update(report.scoring_seconds)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Hand the request's record out with its last output; of samples, all there are so far."""
        record = self.ledger.finish(request.request_id)
        if not record:
            return False, None
        for name, values in self._ended.items():
            values.append(record[name])
        return False, {RECORD_KEY: self._siblings.add(request.request_id, record)}

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Nothing is loaded; but a request waits a step for a block that is being computed now."""
        ledger, hashes = self.ledger, request.block_hashes
        place = num_computed_tokens // ledger.block_size
        own = always_computed(ledger.gathers_attention(request.request_id))
        needed = (place + 1) * ledger.block_size <= request.num_tokens - own
        known = needed and place < len(hashes)
        waits = known and ledger.sharing.is_expected(hashes[place], ledger.step)
        return (None if waits else 0), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        pass

    # Statistics

    def get_kv_connector_stats(self) -> EvictionStats | None:
        """Counters since the last call and the live share now (scheduler side only).

        vLLM asks at the end of each step, after finished and aborted requests have left; the step
        that empties the engine is the last to be asked, so each one answers.
        """
        if self._ledger is None:
            return None
        totals = Counter(self._ledger.totals)
        by_label = {
            "requests": Counter(self._ledger.requests_by_policy),
            "scoring_seconds": Counter(self.scoring_seconds),
        }
        data: dict[str, Any] = {name: totals[name] - self._reported[name] for name in COUNTERS}
        for name, sums in by_label.items():
            data[name] = dict(sums - self._reported_by_label.get(name, Counter()))
        self._reported, self._reported_by_label = totals, by_label
        ended, self._ended = self._ended, {name: [] for name in ENDED}
        return EvictionStats(data={**data, **ended, LIVE_SHARE: self._ledger.live_share})

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> EvictionStats:
        return EvictionStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[type, type],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> EvictionPromMetrics:
        return EvictionPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # Worker side

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Allocate the scores."""
        worker_state().register(kv_caches)

    def build_connector_worker_meta(self) -> ScoreReport | None:
        return worker_state().report()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        pass

    def wait_for_save(self) -> None:
        pass
