"""Refuses bad per-request settings at the front door, before they reach the engine.

vLLM runs ``validate_params`` of every configured logits processor in the front end (``LLM``,
the API server) on each request; a ``ValueError`` there refuses the request (HTTP 400). That hook
is all these classes are for: they never touch logits. Each model runner has an interface of its
own for logits processors.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsProcessor as LogitsProcessorV2,
)

from .attention import check_settings
from .config import EvictionConfig

_DEFAULTS = EvictionConfig()


class _Validator:
    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raise ``EvictionConfigError`` (a ``ValueError``) for settings no server could follow.

        What depends on the server (its block size, the policies it offers) is not known in the
        front end; the scheduler checks that, and there a request falls back to the server's
        settings (``KVEvictionConnector.on_new_request``).
        """
        if sampling_params.extra_args:
            check_settings(_DEFAULTS.request_settings(sampling_params.extra_args, block_size=1))


class RequestValidator(_Validator, LogitsProcessor):
    """A logits processor in name only, for the V1 runner (CPU)."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        pass

    def apply(self, logits: Any) -> Any:
        return logits

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        pass


class RequestValidatorV2(_Validator, LogitsProcessorV2):
    """The same for the V2 runner (CUDA)."""

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        return False  # it modifies no logits of any request

    def apply(self, logits: Any, ctx: Any) -> Any:
        return logits
