"""Values as users give them: parsed, or refused in one sentence. No vLLM, no torch."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from .policies import Policy, PolicyParameterError, get_policy
from .policies.base import MOST, shown

RENAMED = {"score_every": "score_query_stride", "score_layers": "score_layer_stride"}
"""Server settings under their former names, as records of that time have them."""


class EvictionConfigError(ValueError):
    """A setting is wrong; the message is one sentence that says what to change."""


def check_renamed(names: Iterable[str]) -> None:
    """Refuse a server setting under its former name.

    Raises:
        EvictionConfigError: the first such name, and what the setting is called.

    """
    for name in names:
        if name in RENAMED:
            raise EvictionConfigError(
                f"{name} is now called {RENAMED[name]} ({flag(RENAMED[name])}); "
                "give it under that name"
            )


def parse_sparsity(name: str, value: Any) -> float:
    """``value`` as a sparsity.

    Raises:
        EvictionConfigError: not a number with 0 <= value < 1.

    """
    try:
        sparsity = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):  # the last of an integer beyond any float
        sparsity = math.nan
    if not 0.0 <= sparsity < 1.0:
        raise EvictionConfigError(
            f"{name} is {shown(value)}; give a number from 0 (evict nothing) to below 1"
        )
    return sparsity


def parse_int(name: str, value: Any, least: int) -> int:
    """``value`` as a whole number from ``least`` to ``MOST``; digits in text will do.

    Raises:
        EvictionConfigError: it is none.

    """
    # Python refuses to read thousands of digits, with a sentence of its own.
    if isinstance(value, str) and value.isdecimal() and len(value) <= len(str(MOST)):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise EvictionConfigError(
            f"{name} is {shown(value)}; give a whole number of at least {least}"
        )
    if value > MOST:
        raise EvictionConfigError(f"{name} is {shown(value)}; give at most {MOST}")
    return value


def parse_bool(name: str, value: Any) -> bool:
    """``value``, if it is a truth value; no text is one."""
    if not isinstance(value, bool):
        raise EvictionConfigError(f"{name} is {shown(value)}; give true or false, without quotes")
    return value


def parse_choice(name: str, value: Any, known: tuple[str, ...]) -> str:
    """``value``, if it is one of ``known``."""
    if value not in known:
        raise EvictionConfigError(f"{name} is {shown(value)}; use one of: {', '.join(known)}")
    return value


def parse_score_queries(name: str, value: Any) -> str | int:
    """``all``, or a number of queries."""
    if value == "all":
        return value
    try:
        return parse_int(name, value, 1)
    except EvictionConfigError:
        raise EvictionConfigError(
            f'{name} is {shown(value)}; give "all" or how many of a chunk\'s last queries count'
        ) from None


def parse_policies(name: str, value: Any) -> str | tuple[str, ...]:
    """``any``, or names of policies."""
    if value == "any":
        return value
    if not isinstance(value, list | tuple):
        raise EvictionConfigError(f'{name} is {shown(value)}; give "any" or a list')
    return tuple(policy_named(policy).name for policy in value)


def parse_args_by_policy(name: str, value: Any) -> Mapping[str, Mapping[str, Any]]:
    """Parameters by policy, if every policy takes those under its name."""
    if not isinstance(value, Mapping):
        raise EvictionConfigError(
            f'{name} is {shown(value)}; give a mapping like {{"cab": {{...}}}}'
        )
    for policy, args in value.items():
        resolve_args(policy, args)
    return value


def parse_policy_args(value: Any) -> Mapping[str, Any] | None:
    """A mapping, or one as JSON text: ``vllm_xargs`` carries no mappings over HTTP."""
    parsed = value
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):  # not JSON; or brackets, thousands deep
            parsed = value
    if parsed is not None and not isinstance(parsed, Mapping):
        raise EvictionConfigError(
            f"kv_policy_args is {shown(value)}; "
            "give a mapping of parameter to value, or one as JSON"
        )
    return parsed


def flag(setting: str) -> str:
    """A setting as a flag of the command line."""
    return "--" + setting.replace("_", "-")


def policy_named(name: Any) -> Policy:
    """The policy called ``name``."""
    try:
        return get_policy(name if isinstance(name, str) else shown(name))
    except PolicyParameterError as error:
        raise EvictionConfigError(str(error)) from None


def resolve_args(name: str, args: Any) -> dict[str, Any]:
    """Parameters of a policy, complete."""
    policy = policy_named(name)
    if not isinstance(args, Mapping):
        raise EvictionConfigError(f"policy_args of {name} is {shown(args)}; give a mapping")
    try:
        return policy.resolve(args)
    except PolicyParameterError as error:
        raise EvictionConfigError(str(error)) from None


def suggestion(name: Any, known: Any) -> str:
    """What the user may have meant, for the end of a sentence."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"
