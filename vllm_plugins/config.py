"""Settings: parsed once, validated once, frozen. Neither vLLM nor torch is imported here."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from .policies import (
    ATTENTION,
    GRAPH,
    KEY_NORM,
    TOKEN_MASS,
    TOKEN_PEAK,
    TOKENS,
    Policy,
    PolicyParameterError,
    TokenRule,
    get_policy,
    policy_names,
)

SCORES = ("default", "sum", "mean", "decay")
BLOCK, TOKEN = GRANULARITIES = ("block", "token")
DEFAULT_SCORES = {BLOCK: "sum", TOKEN: "mean"}
"""What ``score="default"`` means at each granularity."""
REQUEST_KEYS = (
    "kv_policy", "kv_sparsity", "kv_budget_tokens", "kv_policy_args", "kv_granularity"
)  # fmt: skip
_VLLM_KEYS = ("kv_transfer_params", "kv_cache_report_mode")
"""Of ``extra_args``; vLLM's own."""
RENAMED = {"score_every": "score_query_stride", "score_layers": "score_layer_stride"}
"""Server settings under their former names, as records of that time have them."""


class EvictionConfigError(ValueError):
    """A setting is wrong; the message is one sentence that says what to change."""


@dataclass(frozen=True)
class RequestSettings:
    """What one request follows: a policy with its parameters, and a budget.

    ``budget_tokens`` (absolute) replaces ``sparsity`` (relative) where it is given.
    """

    policy: str
    sparsity: float
    budget_tokens: int | None
    policy_args: Mapping[str, Any]
    granularity: str = BLOCK

    @cached_property
    def evicts(self) -> bool:
        """False: no block of the request is ever evicted, and no score is gathered for it."""
        return get_policy(self.policy).evicts and (
            self.sparsity > 0 or self.budget_tokens is not None
        )

    @cached_property
    def rule(self) -> TokenRule | None:
        """How the budget is spent at token granularity; None at block granularity."""
        policy = get_policy(self.policy)
        if self.granularity != TOKEN or policy.tokens is None:
            return None
        return policy.tokens(self.policy_args)

    @cached_property
    def needs(self) -> frozenset[str]:
        """The inputs gathered for this request; none where it never evicts."""
        if not self.evicts:
            return frozenset()
        return get_policy(self.policy).needed(self.policy_args, self.granularity)

    def keep(self, num_tokens: int, block_size: int, min_blocks: int) -> int:
        """How many full blocks a sequence of ``num_tokens`` may hold."""
        if self.budget_tokens is not None:
            return self.budget_tokens // block_size
        # The slack keeps 0.7 * 10 blocks at 3 where (1 - 0.7) * 10 is 3.0000000000000004.
        blocks = math.ceil((1.0 - self.sparsity) * num_tokens / block_size - 1e-9)
        return max(min_blocks, blocks)

    def effective_sparsity(self, num_tokens: int, block_size: int, min_blocks: int) -> float:
        """Share of a sequence of ``num_tokens`` that its budget really lets go.

        Less than ``sparsity`` where ``min_blocks`` or whole blocks leave more, 0 where the
        sequence fits into its budget.
        """
        if num_tokens < 1:
            return 0.0
        kept = self.keep(num_tokens, block_size, min_blocks) * block_size
        return max(0.0, 1.0 - kept / num_tokens)


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
    granularity: str = BLOCK
    """What is chosen: ``block``, one set of blocks for all heads of a layer group; or ``token``,
    where each KV head of each layer keeps its own tokens, packed into whole blocks."""
    request_granularity: str = "any"
    """``any``, or ``server``: no request may ask for another granularity. Saves the memory and
    time of the other one's scores."""
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
    at block granularity and ``mean`` at token granularity."""
    score_half_life: int = 256
    """Tokens after which attention counts half; for ``score="decay"``."""
    score_queries: str | int = "all"
    """``all`` queries of a chunk are scored, or its last so many."""
    score_query_stride: int = 8
    """During decode only every N-th query is scored; its score counts N times. A chunk's queries
    are all scored. Default by measurement (results/sampled-scores): scoring everything costs a
    tenth of the throughput and gains 0.3% perplexity at most."""
    score_layer_stride: int = 4
    """At block granularity only every N-th layer of a group is scored, from its first one on.
    Default as above. At token granularity every layer decides for itself, so all are scored."""
    layer_groups: int = 1
    """Groups of layers with a block table, and victims, each; divides the number of layers."""
    request_policies: str | tuple[str, ...] = "any"
    """Policies that requests may ask for. Narrow it and scores nobody can need are skipped."""
    seed: int = 0
    check_integrity: bool = False
    """Check block conservation at every step (for tests; costs time in proportion to blocks)."""
    trace_decisions: bool = False
    """Report each decision (tokens processed, kept blocks) with the finished request."""

    @classmethod
    def parse(cls, settings: Mapping[str, Any]) -> EvictionConfig:
        """Build from untyped settings (JSON, command line).

        Raises:
            EvictionConfigError: the first thing that is wrong, in one sentence.

        """
        known = {f.name for f in fields(cls)}
        check_renamed(settings)
        for name in settings:
            if name not in known:
                raise EvictionConfigError(
                    f"unknown eviction setting {name!r}{_suggest(name, known)}"
                )
        values = dict(settings)
        if isinstance(values.get("request_policies"), list):
            values["request_policies"] = tuple(values["request_policies"])
        config = cls(**values)
        config = replace(
            config,
            sparsity=parse_sparsity("sparsity", config.sparsity),
            budget_tokens=None
            if config.budget_tokens is None
            else _parse_int("budget_tokens", config.budget_tokens, 1),
            score_queries=_parse_score_queries(config.score_queries),
        )
        config._validate()
        return config

    def _validate(self) -> None:
        for name, least in (
            ("sink_blocks", 0),
            ("sink_tokens", 0),
            ("slack_tokens", 0),
            ("min_blocks", 2),
            ("score_half_life", 1),
            ("score_query_stride", 1),
            ("score_layer_stride", 1),
            ("layer_groups", 1),
            ("seed", 0),
        ):
            _parse_int(name, getattr(self, name), least)
        for name in ("check_integrity", "trace_decisions"):
            if not isinstance(getattr(self, name), bool):
                raise EvictionConfigError(f"{name} is {getattr(self, name)!r}; give true or false")
        if self.min_blocks <= self.sink_blocks:
            raise EvictionConfigError(
                f"min_blocks is {self.min_blocks} but {self.sink_blocks} sink blocks and one "
                f"recent block are protected; set min_blocks to at least {self.sink_blocks + 1}"
            )
        _check_choice("granularity", self.granularity, GRANULARITIES)
        _check_choice("request_granularity", self.request_granularity, ("any", "server"))
        if self.score not in SCORES:
            raise EvictionConfigError(f"score is {self.score!r}; use one of: {', '.join(SCORES)}")
        if not isinstance(self.policy_args, Mapping):
            raise EvictionConfigError(
                f'policy_args is {self.policy_args!r}; give a mapping like {{"cab": {{...}}}}'
            )
        if self.request_policies != "any":
            if not isinstance(self.request_policies, tuple):
                raise EvictionConfigError(
                    f'request_policies is {self.request_policies!r}; give "any" or a list'
                )
            for name in self.request_policies:
                _policy(name)
        for name in self.policy_args:
            _resolve(name, self.policy_args[name])
        self._settings(self.policy, self.sparsity, self.budget_tokens, None, self.granularity, "")

    @property
    def granularities(self) -> tuple[str, ...]:
        """What requests of this server may have."""
        return GRANULARITIES if self.request_granularity == "any" else (self.granularity,)

    def slack(self, block_size: int) -> int:
        """``slack_tokens`` in whole blocks."""
        return -(-self.slack_tokens // block_size)

    def score_at(self, granularity: str) -> str:
        """``sum``, ``mean`` or ``decay``."""
        return DEFAULT_SCORES[granularity] if self.score == "default" else self.score

    def needs(self) -> frozenset[str]:
        """Everything that some request of this server may need."""
        return self._needs

    @cached_property
    def _needs(self) -> frozenset[str]:
        names = policy_names() if self.request_policies == "any" else self.request_policies
        needs: frozenset[str] = frozenset()
        for granularity in self.granularities:
            for name in {*names, self.policy}:
                args = _resolve(name, self.policy_args.get(name))
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

    def check_budget(self, block_size: int) -> None:
        """Refuse a server-wide ``budget_tokens`` that cannot hold what is protected, and sinks that
        no region of one block can hold."""
        if self.budget_tokens is not None:
            self._check_budget("budget_tokens", self.budget_tokens, self.granularity, block_size)
        if self.granularity == TOKEN:
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
        self, extra_args: Mapping[str, Any] | None, block_size: int
    ) -> RequestSettings:
        """The settings one request follows.

        Args:
            extra_args: ``SamplingParams.extra_args``; keys other than ``REQUEST_KEYS`` belong
                to others and are ignored, unless they look like ours (``check_request_keys``).
            block_size: tokens per KV block.

        Raises:
            EvictionConfigError: a value is wrong; the request has to be refused.

        """
        extra = extra_args or {}
        check_request_keys(extra)
        policy = extra.get("kv_policy", self.policy)
        _policy(policy)
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
            sparsity, budget = 0.0, _parse_int("kv_budget_tokens", extra["kv_budget_tokens"], 1)
        elif not get_policy(policy).evicts:
            sparsity, budget = 0.0, None
        granularity = extra.get("kv_granularity", self.granularity)
        _check_choice("kv_granularity", granularity, GRANULARITIES)
        if granularity not in self.granularities:
            raise EvictionConfigError(
                f"kv_granularity {granularity!r} is not offered by this server; drop it, or start "
                "the server with request_granularity any"
            )
        overrides = _parse_policy_args(extra.get("kv_policy_args"))
        settings = self._settings(policy, sparsity, budget, overrides, granularity, "kv_")
        if settings.budget_tokens is not None:
            self._check_budget("kv_budget_tokens", settings.budget_tokens, granularity, block_size)
        if granularity == TOKEN and settings.evicts:
            self._check_sink_tokens(block_size)
        if settings.needs - self.needs():
            raise EvictionConfigError(
                f"policy {policy} with {dict(settings.policy_args)} needs scores that this server "
                'does not gather; start it with request_policies "any", or with these policy_args'
            )
        return settings

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
        if not _policy(policy).evicts and evicting:
            raise EvictionConfigError(
                f"policy {policy} never evicts, so {prefix}sparsity or {prefix}budget_tokens "
                f"would do nothing; choose another policy or drop them"
            )
        if budget is not None and not prefix and sparsity > 0:
            raise EvictionConfigError("give sparsity or budget_tokens, not both")
        args = _resolve(policy, {**self.policy_args.get(policy, {}), **(overrides or {})})
        try:
            _policy(policy).require(granularity, args, prefix)
        except PolicyParameterError as error:
            raise EvictionConfigError(str(error)) from None
        needs_mean = granularity == TOKEN and self.score_at(TOKEN) == "mean" and evicting
        if needs_mean and self.score_queries != "all":
            raise EvictionConfigError(
                "score mean divides by all queries at token granularity, and score_queries "
                f'{self.score_queries} counts only some; give score_queries "all" or score "sum"'
            )
        return RequestSettings(policy, sparsity, budget, args, granularity)

    def summary(self) -> str:
        """What an engine with these settings does, for its log."""
        settings = self._settings(
            self.policy, self.sparsity, self.budget_tokens, None, self.granularity, ""
        )
        if not settings.evicts:
            return (
                f"policy {self.policy} evicts nothing unless a request asks for it; "
                "prefix caching is off"
            )
        budget = (
            f"sparsity {self.sparsity:g}"
            if self.budget_tokens is None
            else f"{self.budget_tokens:,} tokens"
        )
        each = "tokens for every head" if self.granularity == TOKEN else "blocks for all heads"
        return (
            f"policy {self.policy}, {budget}, {each}; prefix caching is off, as blocks "
            "computed after an eviction cannot be shared"
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values (the connector's extra configuration)."""
        values = asdict(self)
        if isinstance(values["request_policies"], tuple):
            values["request_policies"] = list(values["request_policies"])
        return values


def check_renamed(names: Iterable[str]) -> None:
    """Refuse a server setting under its former name.

    Raises:
        EvictionConfigError: the first such name, and what the setting is called.

    """
    for name in names:
        if name in RENAMED:
            raise EvictionConfigError(
                f"{name} is now called {RENAMED[name]} ({_flag(RENAMED[name])}); "
                "give it under that name"
            )


def check_request_keys(extra_args: Mapping[str, Any]) -> None:
    """Refuse keys that look like a request's eviction settings but would be ignored.

    Raises:
        EvictionConfigError: a misspelt key, one without its ``kv_``, one of the server's, or ours
            inside ``kv_transfer_params``.

    """
    server_settings = {f.name for f in fields(EvictionConfig)} | RENAMED.keys()
    for name in extra_args:
        if name in REQUEST_KEYS or name in _VLLM_KEYS:
            continue
        bare = str(name).lower().replace("-", "_").removeprefix("kv_")
        close = f"kv_{bare}" in REQUEST_KEYS or difflib.get_close_matches(
            str(name), REQUEST_KEYS, cutoff=0.85
        )
        if not close and bare in server_settings and ("_" in bare or bare != str(name)):
            raise EvictionConfigError(
                f"{name!r} is a setting of the server, not of a request; start the server with it "
                f"({_flag(RENAMED.get(bare, bare))})"
            )
        if close or str(name).startswith("kv_"):
            raise EvictionConfigError(
                f"unknown request setting {name!r}{_suggest(f'kv_{bare}', REQUEST_KEYS)}"
            )
    inside = extra_args.get("kv_transfer_params")
    if isinstance(inside, Mapping) and (lost := [key for key in REQUEST_KEYS if key in inside]):
        raise EvictionConfigError(
            f"{lost[0]} stands in kv_transfer_params, where nobody reads it; "
            "put it into extra_args (vllm_xargs over HTTP)"
        )


def parse_sparsity(name: str, value: Any) -> float:
    """``value`` as a sparsity.

    Raises:
        EvictionConfigError: not a number with 0 <= value < 1.

    """
    try:
        sparsity = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        sparsity = math.nan
    if not 0.0 <= sparsity < 1.0:
        raise EvictionConfigError(
            f"{name} is {_shown(value)}; give a number from 0 (evict nothing) to below 1"
        )
    return sparsity


def _parse_int(name: str, value: Any, least: int) -> int:
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise EvictionConfigError(
            f"{name} is {_shown(value)}; give a whole number of at least {least}"
        )
    return value


def _parse_score_queries(value: Any) -> str | int:
    if value == "all":
        return value
    try:
        return _parse_int("score_queries", value, 1)
    except EvictionConfigError:
        raise EvictionConfigError(
            f'score_queries is {_shown(value)}; give "all" or how many of a chunk\'s last queries '
            "count"
        ) from None


def _parse_policy_args(value: Any) -> Mapping[str, Any] | None:
    """A mapping, or one as JSON text: ``vllm_xargs`` carries no mappings over HTTP."""
    parsed = value
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):  # not JSON; or brackets, thousands deep
            parsed = value
    if parsed is not None and not isinstance(parsed, Mapping):
        raise EvictionConfigError(
            f"kv_policy_args is {_shown(value)}; "
            "give a mapping of parameter to value, or one as JSON"
        )
    return parsed


def _flag(setting: str) -> str:
    return "--" + setting.replace("_", "-")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _policy(name: Any) -> Policy:
    try:
        return get_policy(name if isinstance(name, str) else repr(name))
    except PolicyParameterError as error:
        raise EvictionConfigError(str(error)) from None


def _resolve(name: str, args: Any) -> dict[str, Any]:
    policy = _policy(name)
    if args is not None and not isinstance(args, Mapping):
        raise EvictionConfigError(f"policy_args of {name} is {args!r}; give a mapping")
    try:
        return policy.resolve(args)
    except PolicyParameterError as error:
        raise EvictionConfigError(str(error)) from None


def _check_choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise EvictionConfigError(f"{name} is {_shown(value)}; use one of: {', '.join(known)}")


def _suggest(name: Any, known: Any) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"
