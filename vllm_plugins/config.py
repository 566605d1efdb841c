"""Settings of a server: parsed once, validated once, frozen. No vLLM, no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, partial
from typing import Any

from .parsing import (
    EvictionConfigError,
    check_renamed,
    parse_args_by_policy,
    parse_bool,
    parse_choice,
    parse_int,
    parse_policies,
    parse_policy_args,
    parse_score_queries,
    parse_sparsity,
    policy_named,
    resolve_args,
    suggestion,
)
from .policies import (
    ATTENTION,
    GRAPH,
    KEY_NORM,
    TOKEN_MASS,
    TOKEN_PEAK,
    TOKENS,
    PolicyParameterError,
    get_policy,
    policy_names,
)
from .request_keys import check_request_keys
from .request_settings import (
    BLOCK,
    DEFAULT_GRANULARITY,
    GRANULARITIES,
    TOKEN,
    RequestSettings,
)

PROMPT_STRIDES = (1, 2, 4, 8, 16)
"""They divide every block size."""
SCORED_IN_FULL = 256
"""So many last queries of a chunk are all scored: of the newest tokens there is no other word. A
sample of these too cost H2O 3% of perplexity at 0.9 (results/prompt-stride/every-query)."""
SCORES = ("default", "sum", "mean", "decay")
DEFAULT_SCORES = {BLOCK: "sum", TOKEN: "mean"}
"""What ``score="default"`` means at each granularity."""
_GRANULARITIES = (DEFAULT_GRANULARITY, *GRANULARITIES)


@dataclass(frozen=True)
class EvictionConfig:
    """Server-wide settings: the connector's extra configuration, field by field.

    A request follows ``policy`` with ``sparsity`` or ``budget_tokens`` unless it says otherwise
    (``kv_policy``, ``kv_sparsity``, ``kv_budget_tokens``, ``kv_policy_args``, ``kv_granularity``).
    """

    policy: str = "h2o"
    sparsity: float = 0.0
    """Share of a sequence's blocks that is evicted, 0 <= sparsity < 1. 0 is stock vLLM."""
    budget_tokens: int | None = None
    """Absolute budget in tokens of full blocks, instead of ``sparsity``."""
    policy_args: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Parameters by policy: ``{"cab": {"local": 0.6, "bridge": 0.1, "importance": 0.3}}``."""
    granularity: str = DEFAULT_GRANULARITY
    """What is chosen: ``block``, one set of blocks for all heads of a layer group; or ``token``,
    where each KV head of each layer keeps its own tokens, packed into whole blocks. The default is
    ``token`` for every policy that has this form: at a tenth of the cache H2O and CAB cost half of
    what they cost by blocks of the same score (results/ladder)."""
    request_granularity: str = "any"
    """``any``, or ``server``: no request may ask for another granularity. Saves the memory and
    time of the other one's scores."""
    request_budgets: str = "any"
    """``any``, or ``server``: no request may keep more than the server's own budget lets it. Memory
    is planned by that budget then, and ``max_model_len`` may be longer than what the pool holds."""
    sink_blocks: int = 1
    """So many first blocks of a sequence are never evicted, at block granularity."""
    sink_tokens: int = 4
    """So many first tokens of a sequence are never evicted, at token granularity."""
    slack_tokens: int = 32
    """At token granularity a request is packed when it holds so many tokens, rounded up to whole
    blocks, more than its budget: on average half of that. Less slack means more packing."""
    min_blocks: int = 4
    """No relative budget is smaller than this."""
    score: str = "default"
    """How attention mass adds up: ``sum``, ``mean`` per query, or ``decay``. The default is ``sum``
    at block granularity and ``mean`` at token granularity, with ``score_queries`` all."""
    score_half_life: int = 256
    """Tokens after which attention counts half; for ``score="decay"``."""
    score_queries: str | int = "all"
    """``all`` queries of a chunk are scored, or its last so many."""
    score_query_stride: int = 8
    """During decode only every N-th query is scored; its score counts N times. Default by
    measurement at block granularity (results/sampled-scores): scoring everything costs a tenth of
    the throughput and gains 0.3% perplexity at most. At token granularity all queries gain up to
    1.6% (results/sampled-decodes); at what cost is unknown."""
    score_prompt_stride: int = 4
    """Of a chunk's queries but its last 256 only every N-th is scored, and counts N times: one of
    ``PROMPT_STRIDES``. With ``score="decay"`` all are scored. Default by measurement: with long
    prompts all queries cost a tenth of the throughput (results/serving-gpu/long_tokens), and gain
    0.3% perplexity at sparsity 0.9 (results/prompt-stride)."""
    score_layer_stride: int = 4
    """At block granularity only every N-th layer of a group is scored, from its first one on.
    Default as above. At token granularity every layer decides for itself, so all are scored."""
    layer_groups: int = 1
    """Groups of layers with a block table, and victims, each; divides the number of layers."""
    request_policies: str | tuple[str, ...] = "any"
    """Policies that requests may ask for. Narrow it and scores nobody can need are skipped."""
    seed: int = 0
    check_integrity: bool = False
    """Check block conservation at every step (for tests; costs time in proportion to blocks,
    0.1 s for a million)."""
    trace_decisions: bool = False
    """Report each decision (tokens processed, kept blocks) with the finished request."""

    @classmethod
    def parse(cls, settings: Mapping[str, Any]) -> EvictionConfig:
        """Build from untyped settings (JSON, command line).

        Raises:
            EvictionConfigError: the first thing that is wrong, in one sentence.

        """
        config = cls(**parse_settings(settings))
        config._validate()
        return config

    def _validate(self) -> None:
        """Refuse settings that do not go together."""
        if self.min_blocks <= self.sink_blocks:
            raise EvictionConfigError(
                f"min_blocks is {self.min_blocks} but {self.sink_blocks} sink blocks and one "
                f"recent block are protected; set min_blocks to at least {self.sink_blocks + 1}"
            )
        own = self._own_settings()
        if self.request_budgets == "server" and not own.evicts:
            raise EvictionConfigError(
                "request_budgets server holds requests to the server's own budget, and it has "
                "none; give a policy that evicts with sparsity or budget_tokens"
            )

    @property
    def granularities(self) -> tuple[str, ...]:
        """What requests of this server may have."""
        if self.request_granularity == "any":
            return GRANULARITIES
        return (self._own_settings().granularity,)

    def granularity_of(self, policy: str, args: Mapping[str, Any], own: str | None = None) -> str:
        """Of a request for ``policy``; ``own``: what it asks for itself.

        Raises:
            EvictionConfigError: an unknown policy or parameter.

        """
        granularity = own or self.granularity
        if granularity != DEFAULT_GRANULARITY:
            return granularity
        args = resolve_args(policy, {**self.policy_args.get(policy, {}), **args})
        try:
            policy_named(policy).require(TOKEN, args)
        except PolicyParameterError:
            return BLOCK
        return TOKEN

    def slack(self, block_size: int) -> int:
        """``slack_tokens`` in whole blocks."""
        return -(-self.slack_tokens // block_size)

    def score_at(self, granularity: str) -> str:
        """``sum``, ``mean`` or ``decay``."""
        if self.score != "default":
            return self.score
        return DEFAULT_SCORES[granularity] if self.score_queries == "all" else "sum"

    @property
    def prompt_stride(self) -> int:
        """``score_prompt_stride`` where it applies: with a decay every query is scored."""
        return 1 if self.score == "decay" else self.score_prompt_stride

    def most_blocks(
        self, settings: RequestSettings, num_tokens: int, block_size: int, in_flight_tokens: int
    ) -> int:
        """Full and other blocks that a request of ``num_tokens`` holds at most, one that evicts.

        Args:
            settings: what it follows.
            num_tokens: of its end.
            block_size: tokens per block.
            in_flight_tokens: that may be scheduled and not processed yet, so not evictable.

        """
        kept = settings.keep(num_tokens, block_size, self.min_blocks)
        return kept + self.slack(block_size) + -(-in_flight_tokens // block_size) + 1

    def planned_blocks(
        self, max_model_len: int, block_size: int, in_flight_tokens: int
    ) -> int | None:
        """What the longest request holds at most; None where it may keep all."""
        if self.request_budgets != "server":
            return None
        own = self._own_settings()
        return self.most_blocks(own, max_model_len, block_size, in_flight_tokens)

    def needs(self) -> frozenset[str]:
        """Everything that some request of this server may need."""
        return self._needs

    @cached_property
    def _needs(self) -> frozenset[str]:
        names = policy_names() if self.request_policies == "any" else self.request_policies
        needs: frozenset[str] = frozenset()
        for granularity in self.granularities:
            for name in {*names, self.policy}:
                args = resolve_args(name, self.policy_args.get(name, {}))
                try:
                    get_policy(name).require(granularity, args)
                except PolicyParameterError:
                    continue  # no request can have this policy so
                needs |= get_policy(name).needed(args, granularity)
        if self.request_policies == "any":
            # A request may choose parameters (cab's bridge definition) that need more.
            if BLOCK in self.granularities:
                needs |= {ATTENTION, KEY_NORM, GRAPH}
            if TOKEN in self.granularities:
                needs |= {TOKENS, TOKEN_MASS, TOKEN_PEAK}
        return needs

    def token_settings(self) -> list[RequestSettings]:
        """The policies that this server's settings name (where any may be asked for, all), if they
        have a form at token granularity and requests may use it; any budget."""
        if TOKEN not in self.granularities:
            return []
        offered = policy_names() if self.request_policies == "any" else self.request_policies
        made = []
        for name in sorted({self.policy, *offered}):
            if get_policy(name).tokens is not None:
                with suppress(EvictionConfigError):  # its parameters are of the other granularity
                    made.append(self._settings(name, 0.5, None, None, TOKEN, ""))
        return made

    def check_budget(self, block_size: int) -> None:
        """Refuse a server-wide ``budget_tokens`` that cannot hold what is protected, and sinks that
        no region of one block can hold."""
        settings = self._own_settings()
        if self.budget_tokens is not None:
            granularity = settings.granularity
            self._check_budget("budget_tokens", self.budget_tokens, granularity, block_size)
        if settings.granularity == TOKEN and settings.evicts:
            self._check_sink_tokens(block_size)

    def _check_budget(self, name: str, budget: int, granularity: str, block_size: int) -> None:
        # A region of one block and a recent one, or the sinks and a recent one.
        blocks = 2 if granularity == TOKEN else self.sink_blocks + 1
        if budget < blocks * block_size:
            raise EvictionConfigError(
                f"{name} is {budget}, below the {blocks} blocks of {block_size} tokens that are "
                f"protected (sinks and recent ones); give at least {blocks * block_size}"
            )

    def _check_sink_tokens(self, block_size: int) -> None:
        if self.sink_tokens > block_size:
            raise EvictionConfigError(
                f"sink_tokens is {self.sink_tokens}, more than a block of {block_size} tokens can "
                f"hold; give at most {block_size}"
            )

    def request_settings(
        self, extra_args: Mapping[str, Any] | None, block_size: int | None
    ) -> RequestSettings:
        """The settings one request follows.

        Args:
            extra_args: ``SamplingParams.extra_args``; keys other than ``REQUEST_KEYS`` belong
                to others and are ignored, unless they look like ours (``check_request_keys``).
            block_size: tokens per KV block; None: not known here, so nothing that depends on it
                is checked.

        Raises:
            EvictionConfigError: a value is wrong; the request has to be refused.

        """
        extra = extra_args or {}
        check_request_keys(extra, [f.name for f in fields(self)])
        policy = extra.get("kv_policy", self.policy)
        policy_named(policy)
        if (
            self.request_policies != "any"
            and policy != self.policy
            and policy not in self.request_policies
        ):
            raise EvictionConfigError(
                f"kv_policy {policy!r} is not offered by this server; "
                f"use one of: {', '.join(sorted({self.policy, *self.request_policies}))}"
            )
        if "kv_sparsity" in extra and "kv_budget_tokens" in extra:
            raise EvictionConfigError("give kv_sparsity or kv_budget_tokens, not both")
        sparsity, budget = self.sparsity, self.budget_tokens
        if "kv_sparsity" in extra:
            sparsity, budget = parse_sparsity("kv_sparsity", extra["kv_sparsity"]), None
        elif "kv_budget_tokens" in extra:
            sparsity, budget = 0.0, parse_int("kv_budget_tokens", extra["kv_budget_tokens"], 1)
        elif not get_policy(policy).evicts:
            sparsity, budget = 0.0, None
        granularity = extra.get("kv_granularity", self.granularity)
        if "kv_granularity" in extra:
            parse_choice("kv_granularity", granularity, _GRANULARITIES)
        overrides = parse_policy_args(extra.get("kv_policy_args"))
        settings = self._settings(policy, sparsity, budget, overrides, granularity, "kv_")
        granularity = settings.granularity
        if granularity not in self.granularities and (settings.evicts or "kv_granularity" in extra):
            raise EvictionConfigError(
                f"kv_granularity {granularity!r} is not offered by this server; drop it, choose a "
                "policy that has the server's, or start the server with request_granularity any"
            )
        if block_size is not None and settings.budget_tokens is not None:
            self._check_budget("kv_budget_tokens", settings.budget_tokens, granularity, block_size)
        if block_size is not None and granularity == TOKEN and settings.evicts:
            self._check_sink_tokens(block_size)
        if self.request_budgets == "server":
            self._check_within_own(settings)
        if settings.needs - self.needs():
            raise EvictionConfigError(
                f"policy {policy} with {dict(settings.policy_args)} needs scores that this server "
                'does not gather; start it with request_policies "any", or with these policy_args'
            )
        return settings

    def _check_within_own(self, settings: RequestSettings) -> None:
        """Refuse a request that would keep more than the server's budget."""
        if self.budget_tokens is not None:
            within = settings.budget_tokens is not None and (
                settings.budget_tokens <= self.budget_tokens
            )
            allowed = f"kv_budget_tokens of at most {self.budget_tokens}"
        else:
            within = settings.budget_tokens is None and settings.sparsity >= self.sparsity
            allowed = f"kv_sparsity of at least {self.sparsity:g}"
        if not (settings.evicts and within):
            raise EvictionConfigError(
                "this server holds every request to its own budget; use a policy that evicts, "
                f"and {allowed} or none at all"
            )

    def _own_settings(self) -> RequestSettings:
        """Those of a request that asks for nothing."""
        return self._settings(
            self.policy, self.sparsity, self.budget_tokens, None, self.granularity, ""
        )

    def _settings(
        self,
        policy: str,
        sparsity: float,
        budget: int | None,
        overrides: Any,
        granularity: str,
        prefix: str,
    ) -> RequestSettings:
        evicting = sparsity > 0 or budget is not None
        if not policy_named(policy).evicts and evicting:
            raise EvictionConfigError(
                f"policy {policy} never evicts, so {prefix}sparsity or {prefix}budget_tokens "
                f"would do nothing; choose another policy or drop them"
            )
        if budget is not None and not prefix and sparsity > 0:
            raise EvictionConfigError("give sparsity or budget_tokens, not both")
        args = resolve_args(policy, {**self.policy_args.get(policy, {}), **(overrides or {})})
        granularity = self.granularity_of(policy, args, granularity)
        try:
            policy_named(policy).require(granularity, args, prefix)
        except PolicyParameterError as error:
            raise EvictionConfigError(str(error)) from None
        needs_mean = granularity == TOKEN and self.score_at(TOKEN) == "mean" and evicting
        if needs_mean and self.score_queries != "all":
            raise EvictionConfigError(
                "score mean divides by all queries at token granularity, and score_queries "
                f'{self.score_queries} counts only some; give score_queries "all", score "sum", or '
                f'{prefix}granularity "block"'
            )
        return RequestSettings(policy, sparsity, budget, args, granularity)

    def summary(self, prefix_caching: bool) -> str:
        """What an engine with these settings does, for its log."""
        settings = self._own_settings()
        prefixes = (
            "prefixes are shared up to a request's first eviction"
            if prefix_caching
            else "prefix caching is off"
        )
        if not settings.evicts:
            return f"policy {self.policy} evicts nothing unless a request asks for it; {prefixes}"
        budget = (
            f"sparsity {self.sparsity:g}"
            if self.budget_tokens is None
            else f"{self.budget_tokens:,} tokens"
        )
        each = "tokens for every head" if settings.granularity == TOKEN else "blocks for all heads"
        held = ", held by every request" if self.request_budgets == "server" else ""
        return f"policy {self.policy}, {budget}{held}, {each}; {prefixes}"

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values (the connector's extra configuration)."""
        values = asdict(self)
        if isinstance(values["request_policies"], tuple):
            values["request_policies"] = list(values["request_policies"])
        return values


def _parse_policy(name: str, value: Any) -> str:
    return policy_named(value).name


def _parse_budget(name: str, value: Any) -> int | None:
    return None if value is None else parse_int(name, value, 1)


def _parse_prompt_stride(name: str, value: Any) -> int:
    stride = parse_int(name, value, 1)
    if stride not in PROMPT_STRIDES:
        raise EvictionConfigError(
            f"{name} is {stride}; give one of: {', '.join(map(str, PROMPT_STRIDES))}"
        )
    return stride


_LEAST = {
    "sink_blocks": 0,
    "sink_tokens": 0,
    "slack_tokens": 0,
    "min_blocks": 2,
    "score_half_life": 1,
    "score_query_stride": 1,
    "score_layer_stride": 1,
    "layer_groups": 1,
    "seed": 0,
}
_CHOICES = {
    "granularity": _GRANULARITIES,
    "request_granularity": ("any", "server"),
    "request_budgets": ("any", "server"),
    "score": SCORES,
}
_PARSERS: dict[str, Callable[[str, Any], Any]] = {
    "policy": _parse_policy,
    "sparsity": parse_sparsity,
    "budget_tokens": _parse_budget,
    "policy_args": parse_args_by_policy,
    "score_queries": parse_score_queries,
    "score_prompt_stride": _parse_prompt_stride,
    "request_policies": parse_policies,
    **{name: partial(parse_int, least=least) for name, least in _LEAST.items()},
    **{name: partial(parse_choice, known=known) for name, known in _CHOICES.items()},
    **dict.fromkeys(("check_integrity", "trace_decisions"), parse_bool),
}
"""One for each field of ``EvictionConfig``."""


def parse_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Some fields of ``EvictionConfig``, each of its type: numbers given as text are numbers then.

    Raises:
        EvictionConfigError: the first that is unknown or wrong by itself.

    """
    check_renamed(settings)
    for name in settings:
        if name not in _PARSERS:
            raise EvictionConfigError(
                f"unknown eviction setting {name!r}{suggestion(name, _PARSERS)}"
            )
    return {name: _PARSERS[name](name, value) for name, value in settings.items()}
