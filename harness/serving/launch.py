"""The flags that turn ``vllm serve`` into a server with eviction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_plugins import eviction_engine_args

from .flags import serve_flags

MIDDLEWARE = "vllm_plugins.middleware.RequestCheck"


def eviction_flags(
    block_size: int, settings: Mapping[str, Any], logits_processors: Sequence[str] = ()
) -> list[str]:
    """Flags of ``vllm serve`` for these eviction settings.

    The engine arguments are those of ``eviction_engine_args``, with the user's own
    ``logits_processors`` beside the validator; the middleware answers HTTP 400 to a request whose
    eviction settings stand where nobody reads them.

    Raises:
        EvictionConfigError: a setting is wrong, or the platform is not supported.

    """
    arguments = eviction_engine_args(block_size=block_size, **settings)
    arguments["logits_processors"] += list(logits_processors)
    return [*serve_flags(arguments), "--middleware", MIDDLEWARE]
