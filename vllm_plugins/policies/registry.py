"""Where a policy's name becomes a policy: the built-in ones, then entry points."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points

from . import cab, dense, h2o, key_norm, keydiff, random, snapkv, streaming, tova
from .base import NEEDS, Policy, PolicyParameterError, shown

ENTRY_POINT_GROUP = "kv_eviction.policies"

_BUILT_IN = {
    module.POLICY.name: module.POLICY
    for module in (dense, h2o, cab, streaming, random, key_norm, tova, snapkv, keydiff)
}


@cache
def _entry_points() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}


def policy_names() -> tuple[str, ...]:
    """Every name ``get_policy`` knows: built-in policies first, then installed ones."""
    return (*_BUILT_IN, *(name for name in _entry_points() if name not in _BUILT_IN))


@cache
def get_policy(name: str) -> Policy:
    """The policy called ``name``.

    Raises:
        PolicyParameterError: no such policy, or an entry point that is not a ``Policy``.

    """
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    entry = _entry_points().get(name)
    if entry is None:
        raise PolicyParameterError(
            f"unknown policy {shown(name)}; use one of: {', '.join(policy_names())}"
        )
    policy = entry.load()
    if not isinstance(policy, Policy) or policy.name != name:
        raise PolicyParameterError(
            f"entry point {name!r} of group {ENTRY_POINT_GROUP} must name a Policy "
            f"called {name!r}, not {policy!r}"
        )
    unknown = set() if callable(policy.needs) else policy.needs - NEEDS
    if unknown:
        raise PolicyParameterError(
            f"policy {name} needs {', '.join(sorted(unknown))}; known: {', '.join(sorted(NEEDS))}"
        )
    return policy
