"""Which keys of a request are ours, and which look like ours and would be ignored."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from .parsing import RENAMED, EvictionConfigError, flag, suggestion
from .policies.base import shown

REQUEST_KEYS = ("kv_policy", "kv_sparsity", "kv_budget_tokens", "kv_policy_args", "kv_granularity")
_VLLM_KEYS = ("kv_transfer_params", "kv_cache_report_mode")
"""Of ``extra_args``; vLLM's own."""


def check_request_keys(extra_args: Mapping[str, Any], server_settings: Collection[str]) -> None:
    """Refuse keys that look like a request's eviction settings but would be ignored.

    Raises:
        EvictionConfigError: a misspelt key, one without its ``kv_``, one of the server's, or ours
            inside ``kv_transfer_params``.

    """
    server_settings = {*server_settings, *RENAMED}
    for name in extra_args:
        if name in REQUEST_KEYS or name in _VLLM_KEYS:
            continue
        bare = str(name).lower().replace("-", "_").removeprefix("kv_")
        close = f"kv_{bare}" in REQUEST_KEYS or difflib.get_close_matches(
            str(name), REQUEST_KEYS, cutoff=0.85
        )
        if not close and bare in server_settings and ("_" in bare or bare != str(name)):
            raise EvictionConfigError(
                f"{shown(name)} is a setting of the server, not of a request; "
                f"start the server with it ({flag(RENAMED.get(bare, bare))})"
            )
        if close or str(name).startswith("kv_"):
            raise EvictionConfigError(
                f"unknown request setting {shown(name)}{suggestion(f'kv_{bare}', REQUEST_KEYS)}"
            )
    inside = extra_args.get("kv_transfer_params")
    if isinstance(inside, Mapping) and (lost := [key for key in REQUEST_KEYS if key in inside]):
        raise EvictionConfigError(
            f"{lost[0]} stands in kv_transfer_params, where nobody reads it; "
            "put it into extra_args (vllm_xargs over HTTP)"
        )
