"""Answers HTTP 400 to requests whose eviction settings this server cannot follow.

vLLM's ``--middleware`` seam. The validator among the logits processors (``validation.py``) sees
what is wrong on any server, in every front end; what depends on the server (its block size, the
policies it offers) only the configuration tells, which the API server keeps in its state.
"""

from __future__ import annotations

import json
from typing import Any

from .attention import check_settings
from .checks import is_configured
from .config import EvictionConfig, EvictionConfigError

_MARK = b'"vllm_xargs"'


class RequestCheck:
    """Pure ASGI middleware; bodies without ``vllm_xargs`` pass unread."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._config: tuple[EvictionConfig, int] | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        messages = [await receive()]
        while messages[-1]["type"] == "http.request" and messages[-1].get("more_body"):
            messages.append(await receive())
        body = b"".join(message.get("body", b"") for message in messages)
        if _MARK in body and (refusal := self._refusal(scope, body)):
            return await _answer_400(send, refusal)

        async def replay() -> Any:
            return messages.pop(0) if messages else await receive()

        return await self._app(scope, replay, send)

    def _refusal(self, scope: Any, body: bytes) -> str | None:
        """What is wrong with the settings in ``body``; None also for what vLLM will refuse."""
        if self._config is None:
            vllm_config = getattr(scope["app"].state, "vllm_config", None)
            if not is_configured(vllm_config):
                return None
            extra = vllm_config.kv_transfer_config.kv_connector_extra_config
            self._config = EvictionConfig.parse(extra), vllm_config.cache_config.block_size
        try:
            request = json.loads(body)
        except ValueError:
            return None
        settings = request.get("vllm_xargs") if isinstance(request, dict) else None
        if not isinstance(settings, dict):
            return None
        config, block_size = self._config
        try:
            check_settings(config.request_settings(settings, block_size))
        except EvictionConfigError as error:
            return str(error)
        return None


async def _answer_400(send: Any, sentence: str) -> None:
    """An error in the form of OpenAI's API."""
    error = {"message": sentence, "type": "BadRequestError", "param": "vllm_xargs", "code": 400}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
