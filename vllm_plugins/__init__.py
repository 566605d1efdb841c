"""KV-cache eviction inside stock vLLM. See README.md; ``register`` is the entry point."""

from __future__ import annotations

from .config import EvictionConfig
from .engine_args import eviction_engine_args
from .parsing import EvictionConfigError
from .registration import register

__all__ = ["EvictionConfig", "EvictionConfigError", "eviction_engine_args", "register"]
