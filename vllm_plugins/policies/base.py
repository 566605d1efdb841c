"""What a policy is: a name, a pure function, and what that function needs to be told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .token_rules import SELECTIONS, TOKEN_NEEDS, TOKENS, TokenRule

ATTENTION = "attention"
"""Attention mass each block received (higher = keep)."""
KEY_NORM = "key_norm"
"""Mean of ``||v|| / ||k||`` over the tokens of a block (higher = keep)."""
GRAPH = "graph"
"""Keyword ``graph``: block-to-block attention mass, ``[n, n]``."""
CHANCE = "chance"
"""Keyword ``chance``: a number in [0, 1) for each block, fixed by request and position."""

BLOCK_SCORES = frozenset({ATTENTION, KEY_NORM, GRAPH})
"""What the workers report to the scheduler, by block."""
NEEDS = BLOCK_SCORES | {CHANCE} | TOKEN_NEEDS

MOST = 2**31 - 1
"""No whole number that a user gives is larger: more tokens than any context has."""
_LONGEST = 100
"""Characters of a user's value in a sentence."""

Needs = frozenset[str] | Callable[[Mapping[str, Any]], frozenset[str]]


DEFAULT = "default"
"""The value of a parameter whose meaning depends on the granularity (``Policy.defaults``)."""


class PolicyParameterError(ValueError):
    """A policy parameter is unknown or out of range; the message says what to change."""


@dataclass(frozen=True)
class Policy:
    """One eviction policy.

    At block granularity one set of blocks serves all heads of a layer group.
    ``select(scores, positions, keep, *, num_sink_blocks, [graph], [chance], **parameters)``
    returns the indices to keep:

    - ``scores``: float ``[n]``, one per live, full block, higher = keep (zeros where the
      policy needs neither attention nor key norms);
    - ``positions``: int ``[n]``, strictly ascending: the block's place in the sequence
      (block ``i`` holds tokens ``i * block_size`` to ``(i + 1) * block_size - 1``);
    - ``keep``: how many blocks may stay, ``num_sink_blocks < keep < n``;
    - result: int ``[<= keep]``, indices into ``positions``, sorted, without repeats, the sink
      blocks (``positions < num_sink_blocks``) and the last block among them.

    The function sees arrays and returns an array; it holds no state. ``needs`` names the
    inputs that cost something to gather, fixed or as a function of the parameters; nothing
    else is computed for a request that follows the policy.

    At token granularity every KV head keeps its own tokens: ``tokens(parameters)`` gives the rule
    (``token_rules.TokenRule``). A policy may have either form, both, or none (``dense``).
    """

    name: str
    select: Callable[..., np.ndarray] | None = None
    tokens: Callable[[Mapping[str, Any]], TokenRule] | None = None
    needs: Needs = frozenset()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    token_parameters: Mapping[str, Any] = field(default_factory=dict)
    """More parameters, of the form at token granularity alone; ``select`` never sees them."""
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By granularity and name, what the value ``DEFAULT`` of a parameter means there."""
    check: Callable[[Mapping[str, Any]], None] | None = None
    check_granularity: Callable[[Mapping[str, Any], str], None] | None = None
    """Refuses parameters that mean nothing at a granularity (``block`` or ``token``)."""

    def resolve(self, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Defaults with ``overrides`` laid over them.

        Raises:
            PolicyParameterError: an unknown name, a value of the wrong type, or values that
                the policy's own check refuses.

        """
        merged = {**self.parameters, **self.token_parameters}
        for name, value in (overrides or {}).items():
            if name not in merged:
                known = ", ".join(sorted(merged)) or "none"
                raise PolicyParameterError(
                    f"policy {self.name} has no parameter {shown(name)}; it has: {known}"
                )
            merged[name] = _coerce(self.name, name, value, merged[name])
        if self.check is not None:
            self.check(merged)
        return merged

    def meant(self, parameters: Mapping[str, Any], granularity: str) -> dict[str, Any]:
        """Resolved parameters as they act at a granularity (``block`` or ``token``)."""
        names = [*self.parameters, *(self.token_parameters if granularity == "token" else ())]
        means = self.defaults.get(granularity, {})
        unnamed = {n: v for n, v in means.items() if parameters[n] == DEFAULT}
        return {name: unnamed.get(name, parameters[name]) for name in names}

    @property
    def evicts(self) -> bool:
        """False: no block of a request that follows the policy is ever evicted."""
        return self.select is not None or self.tokens is not None

    def require(self, granularity: str, parameters: Mapping[str, Any], prefix: str = "") -> None:
        """Check that the policy has a form at ``granularity``, and its parameters a meaning.

        ``prefix``: of the settings' names where the user reads the sentence.

        Raises:
            PolicyParameterError: it has none.

        """
        if not self.evicts:
            return
        if (self.tokens if granularity == "token" else self.select) is None:
            other = "block" if granularity == "token" else "token"
            raise PolicyParameterError(
                f"policy {self.name} has no form at {granularity} granularity; "
                f"give {prefix}granularity {other}, or another policy"
            )
        for name, default in self.token_parameters.items():
            if granularity != "token" and parameters[name] != default:
                raise PolicyParameterError(
                    f"parameter {name} of policy {self.name} has a meaning at token granularity "
                    f"only; drop it, or give {prefix}granularity token"
                )
        if self.check_granularity is not None:
            self.check_granularity(parameters, granularity)
        if granularity == "token" and self.tokens is not None:
            try:
                self.tokens(parameters)
            except ValueError as error:
                raise PolicyParameterError(f"policy {self.name}: {error}") from None

    def block_parameters(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Those of ``parameters`` that ``select`` takes."""
        return {k: v for k, v in parameters.items() if k not in self.token_parameters}

    def needed(self, parameters: Mapping[str, Any], granularity: str = "block") -> frozenset[str]:
        """The inputs (see ``NEEDS``) that the policy wants under ``parameters``."""
        if granularity == "token":
            return self.tokens(parameters).needs | {TOKENS} if self.tokens else frozenset()
        return self.needs(parameters) if callable(self.needs) else self.needs


def shown(value: Any) -> str:
    """``value`` in a sentence, cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # thousands of digits, or lists in lists as deep
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _coerce(policy: str, name: str, value: Any, default: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and abs(value) <= MOST and isinstance(default, float):  # neither NaN nor infinite
        return float(value)
    same = type(value) is type(default) and not isinstance(value, float)
    if same and not (number and abs(value) > MOST):
        return value
    raise PolicyParameterError(
        f"parameter {name} of policy {policy} is {shown(value)}; "
        f"give a {type(default).__name__} like {default!r}"
    )


def check_shares(policy: str, parameters: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Refuse shares of the budget that are negative or do not sum to 1."""
    values = [parameters[name] for name in names]
    if any(value < 0 for value in values) or abs(sum(values) - 1.0) > 1e-6:
        listed = ", ".join(f"{name}={value:g}" for name, value in zip(names, values, strict=True))
        raise PolicyParameterError(
            f"the shares of policy {policy} must be at least 0 and sum to 1, "
            f"but {listed} sum to {sum(values):g}"
        )


def check_recent(policy: str, recent: float) -> None:
    """Refuse a recent share outside 0 to 1."""
    if not 0.0 <= recent <= 1.0:
        raise PolicyParameterError(f"recent of policy {policy} is {recent:g}; give 0 to 1")


def check_selection(policy: str, selection: str) -> None:
    """Refuse a parameter ``selection`` that is none of ``token_rules.SELECTIONS``."""
    if selection not in SELECTIONS:
        raise PolicyParameterError(
            f"selection of policy {policy} is {shown(selection)}; "
            f"use one of: {', '.join(SELECTIONS)}"
        )


def check_own_sets(policy: str, parameters: Mapping[str, Any]) -> None:
    """Check ``recent`` and ``selection``, which policies with a form by tokens alone have."""
    check_recent(policy, parameters["recent"])
    check_selection(policy, parameters["selection"])


def check_kept(
    kept: np.ndarray, positions: np.ndarray, keep: int, num_sink_blocks: int
) -> np.ndarray:
    """``kept`` if it honours the contract of ``Policy.select``.

    Raises:
        ValueError: which part of the contract is broken.

    """
    kept = np.asarray(kept)
    if kept.ndim != 1 or kept.dtype.kind not in "iu":
        raise ValueError(f"select must return a 1-D array of indices, got {kept!r}")
    if len(kept) > keep:
        raise ValueError(f"select kept {len(kept)} blocks of a budget of {keep}")
    if len(kept) == 0 or kept[0] < 0 or not (kept[1:] > kept[:-1]).all():
        raise ValueError("select must return ascending indices without repeats")
    if kept[-1] != len(positions) - 1:
        raise ValueError("select must keep the last block, and no index beyond it")
    num_sinks = int(np.searchsorted(positions, num_sink_blocks))
    if num_sinks and (len(kept) < num_sinks or kept[num_sinks - 1] != num_sinks - 1):
        raise ValueError(f"select must keep the {num_sinks} sink blocks")
    return kept
