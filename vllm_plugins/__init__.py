"""KV-cache eviction inside stock vLLM. See README.md; ``register`` is the entry point."""

from __future__ import annotations

from .config import EvictionConfig, EvictionConfigError
from .engine_args import eviction_engine_args
from .registration import register

__all__ = ["EvictionConfig", "EvictionConfigError", "eviction_engine_args", "register"]
