"""What is wrong with untyped settings, of a study's file or the command line. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from vllm_plugins.config import EvictionConfig

from ..errors import UsageError

MOST = 10_000_000
"""Above it a number of seconds, requests or tokens is a slip."""
_MOST_SEED = 2**63


def check_request_settings(settings: Mapping[str, Any]) -> None:
    """Refuse what no server with the plugin could follow (``vllm_xargs`` of a request).

    Raises:
        UsageError, EvictionConfigError: the first that is wrong. What depends on the server, its
            block size and the policies it offers, is its own to refuse.

    """
    known = dict(settings)
    if "kv_policy" not in known:
        known.pop("kv_policy_args", None)  # of the server's policy, which is not known here
    EvictionConfig().request_settings(known, block_size=None)
    for name, value in settings.items():
        if isinstance(value, Mapping):
            raise UsageError(f"{name} is {value!r}; a request carries it as JSON text only")
    check_json("settings of a load", settings)


def check_json(name: str, values: Any) -> None:
    """Refuse what no record could hold: a study's file may have dates, NaN and infinities.

    Raises:
        UsageError: naming ``name``.

    """
    names = values if isinstance(values, Mapping) else ()
    if other := [key for key in names if not isinstance(key, str)]:
        raise UsageError(f"{name} has {other[0]!r} where a name belongs; give a text")
    try:
        json.dumps(values, allow_nan=False, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{name} cannot be put into a record ({error}); give finite numbers, texts, lists and "
            "mappings"
        ) from None


def check_numbers(
    specification: type, values: Mapping[str, Any], prefix: str | None = None
) -> None:
    """Refuse what is no number where a number belongs: a study's file may hold anything.

    Args:
        specification: a dataclass; its fields' types are what is checked.
        values: by field.
        prefix: of the flags that set these fields; None: no flag does.

    Raises:
        UsageError: the first value that is wrong.

    """
    kinds = {f.name: str(f.type).removesuffix(" | None") for f in fields(specification)}
    for name, value in values.items():
        kind = {"duration_s": "float"}.get(name) or kinds.get(name)
        if name == "request_rate" and value in ("inf", math.inf):
            continue
        if kind == "int" and type(value) is not int:
            raise UsageError(f"{name} is {value!r}; give a whole number")
        if kind == "float" and type(value) not in (int, float):
            raise UsageError(f"{name} is {value!r}; give a number")
        most = _MOST_SEED if name == "seed" else MOST
        if kind in ("int", "float") and not abs(value) <= most:
            raise UsageError(
                f"{_shown(name, prefix)} is {value}; give a finite number of at most {most:,}"
            )
        if kind == "str" and not isinstance(value, str):
            raise UsageError(f"{name} is {value!r}; give a text")


def _shown(name: str, prefix: str | None) -> str:
    if prefix is None:
        return name
    stem = name.removeprefix("num_") if prefix else name
    return f"--{prefix}{stem.removesuffix('_s').replace('_', '-')}"
