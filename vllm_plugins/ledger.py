"""The scheduler's decisions: whose scores are known, whose budget is exceeded, who is evicted.

Data flows one way: the connector writes what is known (``admit``, ``schedule``, ``observe``),
the KV-cache managers ask ``decide``, the connector takes the decisions away
(``take_evictions``) and hands out a request's record when it ends (``finish``). No vLLM
object is kept but the request, of which a few public fields are read.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .config import EvictionConfig
from .live_blocks import BlockLike, LiveBlocks
from .packs import Pack
from .policies import (
    ATTENTION,
    BLOCK_SCORES,
    CHANCE,
    GRAPH,
    KEY_NORM,
    TokenRule,
    chance,
    check_kept,
    get_policy,
)
from .prefix_sharing import PrefixSharing, Takeover
from .request_settings import RequestSettings
from .request_state import NEVER, RequestLike, RequestState
from .request_table import RequestTable

logger = logging.getLogger("vllm.kv_eviction")

Owner = Callable[[str, Sequence[int]], list[int] | None]
"""Request and positions to the ids of blocks that are the request's alone; None: not now."""


class Ledger:
    """Decides evictions for all requests of one engine.

    Args:
        config: server-wide settings.
        block_size: tokens per block.
        num_groups: layer groups (KV-cache groups of vLLM).
        num_blocks: physical blocks in the pool.
        in_flight_tokens: that may be scheduled and not processed yet.

    """

    def __init__(
        self,
        config: EvictionConfig,
        block_size: int,
        num_groups: int,
        num_blocks: int,
        in_flight_tokens: int = 0,
    ) -> None:
        self.config = config
        self.block_size = block_size
        self.num_groups = num_groups
        self.num_blocks = num_blocks
        self.in_flight_tokens = in_flight_tokens
        self.requests: dict[str, RequestState] = {}
        self.table = RequestTable(block_size, num_groups)
        self.totals: Counter[str] = Counter()
        self.requests_by_policy: Counter[str] = Counter()
        self._step = 0
        self._scores: dict[str, np.ndarray] = {}
        self._pending: dict[str, dict[int, list[int]]] = {}
        self._packs: dict[str, list[Pack]] = {}
        self._takeovers: dict[str, Takeover] = {}
        self.sharing = PrefixSharing()
        self._logged: set[str] = set()

    def admit(
        self, request: RequestLike, settings: RequestSettings, seed: int, refused: str | None = None
    ) -> None:
        """A request arrived. ``refused``: why its own settings were replaced by the server's."""
        self.finish(request.request_id)  # a name that comes again is another request's
        state = RequestState.begin(request, settings, seed, self.table, self.num_groups)
        if refused is not None:
            state.record["refused_settings"] = refused
            self.totals["refused_settings"] += 1
            self._log_once(f"request settings refused, the server's apply: {refused}")
        if self.config.trace_decisions:
            state.record["trace"] = []
        self.requests[request.request_id] = state
        self.requests_by_policy[settings.policy] += 1

    def schedule(self, num_tokens_after: Mapping[str, int], num_pool_blocks: int) -> int:
        """A step was scheduled; returns its number.

        Args:
            num_tokens_after: tokens that each of its requests will have.
            num_pool_blocks: blocks of the pool that are in use.

        """
        self._step += 1
        known = self.requests
        rows = [known[r].row for r in num_tokens_after if r in known]
        if len(rows) < len(num_tokens_after):
            num_tokens_after = {r: n for r, n in num_tokens_after.items() if r in known}
        self.table.begin_step(self._step, rows, list(num_tokens_after.values()), num_pool_blocks)
        return self._step

    def observe(
        self,
        step: int,
        scores: dict[str, np.ndarray],
        graph: Sequence[tuple[str, int, int, np.ndarray, np.ndarray]] = (),
    ) -> None:
        """Scores as they stood after ``step``.

        Args:
            step: the number ``schedule`` gave to the newest step the scores include.
            scores: ``ATTENTION`` and/or ``KEY_NORM`` to float ``[num_blocks]``.
            graph: (request id, group, querying block, key blocks, mass) of that step.

        """
        self._scores = scores
        self.table.end_steps(step)
        for request_id, group, block_id, key_ids, mass in graph:
            owner = self.requests.get(request_id)
            # A row that was on its way when its request was preempted describes freed blocks.
            if owner is not None and owner.num_scored_tokens > 0:
                owner.groups[group].add_graph_row(block_id, key_ids, mass)

    def decide(
        self,
        request_id: str,
        group: int,
        num_processed_tokens: int,
        blocks: Sequence[BlockLike],
        own: Owner | None = None,
    ) -> list[int]:
        """The positions of the blocks that ``request_id`` loses now in ``group``, ascending.

        Only full blocks below ``num_processed_tokens`` (no step in flight reads them any more)
        are considered, and at block granularity only blocks whose last token the reported scores
        include, so that a reused block cannot inherit its former owner's score. ``own`` makes
        blocks the request's alone, where a pack will write into them; None: they all are.
        """
        state = self.requests.get(request_id)
        if state is None or num_processed_tokens < state.due[group]:
            return []
        if state.request.is_finished():
            return []
        rule = state.settings.rule
        if state.settings.needs & BLOCK_SCORES:
            num_processed_tokens = min(num_processed_tokens, state.num_scored_tokens)
        num_full_blocks = min(num_processed_tokens // self.block_size, len(blocks))
        live = state.groups[group]
        live.extend(num_full_blocks, blocks)
        keep = state.settings.keep(state.num_tokens, self.block_size, self.config.min_blocks)
        slack = 0 if rule is None else self.config.slack(self.block_size)
        # A budget never shrinks: until so many more blocks are full there is nothing to decide.
        missing = keep + slack + 1 - len(live.positions)
        if missing > 0:
            state.due[group] = (live.num_seen + missing) * self.block_size
            return []
        started = time.perf_counter()
        kept: np.ndarray | None
        try:
            if rule is None:
                kept = self._select(state, group, live, keep)
            else:
                kept = self._pack(state, rule, group, live, keep, own)
        except Exception as error:
            # A third party's policy must not take the engine down.
            self._fail(state, f"{type(error).__name__}: {error}")
            return []
        if kept is None:  # not now; at the next step again
            state.due[group] = 0
            state.record["decisions_deferred"] += 1
            return []
        evicted = live.retain(kept)
        missing = keep + slack + 1 - len(live.positions)
        state.due[group] = (live.num_seen + missing) * self.block_size
        seconds = time.perf_counter() - started
        state.note_decision(group, num_processed_tokens, len(evicted), seconds)
        self.totals["decisions"] += 1
        self.totals["decision_seconds"] += seconds  # type: ignore[assignment]  # of no whole number
        self.totals["blocks_evicted"] += len(evicted)
        pending = self._pending.setdefault(request_id, {})
        pending.setdefault(group, []).extend(evicted)
        self.sharing.first_eviction(request_id, state.request.num_computed_tokens)
        return evicted

    def _select(self, state: RequestState, group: int, live: LiveBlocks, keep: int) -> np.ndarray:
        settings = state.settings
        policy = get_policy(settings.policy)
        assert policy.select is not None  # ``settings.evicts``
        needs = settings.needs
        channel = ATTENTION if ATTENTION in needs else KEY_NORM
        if channel in needs:
            scores = self._scores[channel][live.block_ids]
        else:
            scores = np.zeros(len(live.positions))
        inputs = {"scores": scores}
        extra: dict[str, Any] = {}
        if GRAPH in needs:
            inputs["graph"] = extra["graph"] = live.graph(self.num_blocks)
        if CHANCE in needs:
            extra["chance"] = chance(live.positions, state.seed, group)
        # Comparisons with NaN are false: a policy would keep too little and not notice.
        if not all(np.isfinite(values).all() for values in inputs.values()):
            raise ValueError("the scores hold NaN or infinity")
        kept = policy.select(
            scores,
            live.positions,
            keep,
            num_sink_blocks=self.config.sink_blocks,
            **extra,
            **policy.block_parameters(settings.policy_args),
        )
        return check_kept(kept, live.positions, keep, self.config.sink_blocks)

    def _pack(
        self,
        state: RequestState,
        rule: TokenRule,
        group: int,
        live: LiveBlocks,
        keep: int,
        own: Owner | None,
    ) -> np.ndarray | None:
        """Plan a pack, and say which blocks stay (None: no memory is left to write them to):

            | region | ......... | recent |     the region takes the best tokens of itself and of
            0        r       n-recent     n     what lies between, head by head; this then goes

        Which tokens these are, the workers alone know; so no score has to come here.
        """
        n, num_recent = len(live.positions), rule.num_recent(keep)
        region, end = keep - num_recent, n - num_recent
        name = state.request.request_id
        # What was packed before is the request's own.
        new = slice(live.num_owned, region)
        if own is not None:
            if (owned := own(name, live.positions[new].tolist())) is None:
                return None
            live.block_ids[new] = owned
            live.num_owned = region
        packs = self._packs.setdefault(name, [])
        packs.append(
            Pack(
                group=group,
                block_ids=live.block_ids[:end].tolist(),
                num_kept_blocks=region,
                budget_blocks=keep,
                # Steps in flight are done when the workers pack: their queries count.
                num_tokens=state.request.num_computed_tokens,
                first_query=state.num_adopted_tokens,
                seed=state.seed,
                policy=state.settings.policy,
                policy_args=state.settings.policy_args,
            )
        )
        return np.concatenate((np.arange(region), np.arange(end, n)))

    @property
    def step(self) -> int:
        """The last one scheduled."""
        return self._step

    def take_evictions(self) -> dict[str, dict[int, list[int]]]:
        """Victims since the last call: ``{request_id: {group: [position, ...]}}``."""
        pending, self._pending = self._pending, {}
        return pending

    def take_packs(self) -> dict[str, list[Pack]]:
        """Packs planned since the last call, by request."""
        packs, self._packs = self._packs, {}
        return packs

    def lost_before(self, request_id: str) -> list[int]:
        """Blocks by layer group that a request has lost, but for what is not taken away yet.

        None, of one that starts; a session that goes on after a pause starts with what it has.
        """
        state = self.requests.get(request_id)
        if state is None:
            return [0] * self.num_groups
        pending = self._pending.get(request_id, {})
        return [live.num_evicted - len(pending.get(g, ())) for g, live in enumerate(state.groups)]

    def take_takeovers(self) -> dict[str, Takeover]:
        """What the prefix cache asks of the workers since the last call, by request."""
        takeovers, self._takeovers = self._takeovers, {}
        return takeovers

    def gathers_attention(self, request_id: str) -> bool:
        """See ``RequestSettings.gathers_attention``; not of a stranger's."""
        state = self.requests.get(request_id)
        return state is not None and state.settings.gathers_attention

    def most_blocks(self, request_id: str) -> int | None:
        """Blocks that a request's prompt needs at most in a layer group; None: all of its own."""
        state = self.requests.get(request_id)
        if state is None or state.due[0] == NEVER:
            return None
        return self.config.most_blocks(
            state.settings, state.num_tokens, self.block_size, self.in_flight_tokens
        )

    def adopt(self, request_id: str, block_ids: Sequence[int]) -> None:
        """A request's first blocks in some layer group come from the prefix cache."""
        state = self.requests.get(request_id)
        if state is None:
            return
        state.num_adopted_tokens = len(block_ids) * self.block_size
        state.record["cached_tokens"] = state.num_adopted_tokens
        if not state.settings.needs:
            return
        takeover = self._takeovers.setdefault(request_id, Takeover())
        takeover.adopted += [(block, place) for place, block in enumerate(block_ids)]
        takeover.starts_afresh = self.gathers_attention(request_id)

    def copy(
        self, request_id: str, group: int, block: int, copy: int, position: int | None
    ) -> None:
        """A copy takes a block's place. ``position``: where, if the workers know the old one."""
        takeover = self._takeovers.setdefault(request_id, Takeover())
        takeover.copies.append((group, block, copy))
        if position is not None:
            takeover.replaced.setdefault(group, {})[position] = copy

    def pack_failed(self, request_id: str, reason: str) -> None:
        """A worker could not rank a request's tokens; it kept the most recent ones instead."""
        state = self.requests.get(request_id)
        if state is not None and "policy_error" not in state.record:
            self._fail(state, reason)

    def _fail(self, state: RequestState, reason: str) -> None:
        # Where memory is planned by budgets, a request must not outgrow its own.
        holds_budget = self.config.request_budgets == "server"
        goes_on = "the most recent tokens stay" if holds_budget else "nothing more is evicted"
        self._log_once(f"policy {state.settings.policy} failed, {goes_on}: {reason}")
        self.totals["policy_errors"] += 1
        state.fail(reason, holds_budget)

    def release(self, request_id: str) -> None:
        """The blocks of a request were freed: it ended or was preempted. Safe to repeat.

        What was planned for them goes too: they may be another's when the workers come to it.
        """
        self._drop_plans(request_id)
        state = self.requests.get(request_id)
        if state is not None:
            state.restart()

    def finish(self, request_id: str) -> dict[str, Any]:
        """Forget a request and return its record; an empty one for a stranger's."""
        state = self.requests.pop(request_id, None)
        self._drop_plans(request_id)
        if state is None:
            return {}
        record = state.final_record(self.block_size, self.config.min_blocks)
        self.table.remove(state.row)
        return record

    def _drop_plans(self, request_id: str) -> None:
        self._pending.pop(request_id, None)
        self._packs.pop(request_id, None)
        self._takeovers.pop(request_id, None)

    @property
    def live_share(self) -> float | None:
        """Share still held of the full blocks of current requests that evict; None: no such."""
        seen, evicted = int(self.table.seen.sum()), int(self.table.evicted.sum())
        return 1.0 - evicted / seen if seen else None

    def _log_once(self, message: str) -> None:
        if message not in self._logged and len(self._logged) < 100:
            self._logged.add(message)
            logger.warning("%s (reported once)", message)
