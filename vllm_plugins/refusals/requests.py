"""Refuses bad per-request settings at the front door, before they reach the engine.

vLLM runs ``validate_params`` of every configured logits processor in the front end (``LLM``,
the API server, ``run-batch``) on each request; a ``ValueError`` there refuses the request (HTTP
400). That hook is all these classes are for: they never touch logits. Each model runner has an
interface of its own for logits processors.

The hook sees the request alone, so the server's own settings are part of the class: the name
``RequestValidator.WORD`` stands for the validator of a server with the settings of
``server_settings.decode(WORD)``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsProcessor as LogitsProcessorV2,
)

from ..config import EvictionConfig
from ..parsing import EvictionConfigError
from ..platforms import check_settings
from .count import refused_requests
from .server_settings import decode


class _PerServer(type(LogitsProcessor)):  # type: ignore[misc]
    """``Validator.WORD`` is the validator for the server that ``WORD`` describes."""

    def __getattr__(cls, word: str) -> type:
        if word.startswith("_"):
            raise AttributeError(word)
        return _for_server(cls, word)


@cache
def _for_server(validator: type, word: str) -> type:
    try:
        config, block_size = decode(word)
    except ValueError as error:
        raise AttributeError(f"{validator.__name__} has no settings {word!r}: {error}") from None
    return type(validator)(
        validator.__name__, (validator,), {"config": config, "block_size": block_size}
    )


class _Validator:
    config = EvictionConfig()
    block_size: int | None = None

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raise ``EvictionConfigError`` (a ``ValueError``) for settings this server cannot follow.

        The scheduler checks again: behind a front end without this validator a bad request
        follows the server's settings (``KVEvictionConnector.on_new_request``).
        """
        if not sampling_params.extra_args:
            return
        try:
            check_settings(cls.config.request_settings(sampling_params.extra_args, cls.block_size))
        except EvictionConfigError:
            refused_requests().inc()
            raise


class RequestValidator(_Validator, LogitsProcessor, metaclass=_PerServer):
    """A logits processor in name only, for the V1 runner (CPU)."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        pass

    def apply(self, logits: Any) -> Any:
        return logits

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        pass


class RequestValidatorV2(_Validator, LogitsProcessorV2, metaclass=_PerServer):
    """The same for the V2 runner (CUDA)."""

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        return False  # it modifies no logits of any request

    def apply(self, logits: Any, ctx: Any) -> Any:
        return logits
