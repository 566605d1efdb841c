"""Answers HTTP 400 to eviction settings that stand where nobody reads them.

vLLM's ``--middleware`` seam. What stands in ``vllm_xargs`` reaches the validator
(``requests.py``) in every front end; a field that no API has is dropped before that, and only the
body shows it.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..policies.base import shown
from ..request_keys import REQUEST_KEYS
from .count import refused_requests

_XARGS = "vllm_xargs"
_MARK = re.compile(rb"kv_|xargs|extra_body|sparsity|budget_tokens|granularity|\\u00", re.IGNORECASE)
"""What a body with a misplaced setting holds: one of these, or a key written in escapes."""


class RequestCheck:
    """Pure ASGI middleware; bodies that cannot hold a misplaced setting pass unparsed."""

    def __init__(self, app: Any) -> None:
        self._app = app
        # There from the start: rate() cannot see the increment that creates a series.
        refused_requests()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        messages = [await receive()]
        while messages[-1]["type"] == "http.request" and messages[-1].get("more_body"):
            messages.append(await receive())
        body = b"".join(message.get("body", b"") for message in messages)
        if _MARK.search(body) and (refusal := misplaced(body)):
            refused_requests().inc()
            return await _answer_400(send, refusal)

        async def replay() -> Any:
            return messages.pop(0) if messages else await receive()

        return await self._app(scope, replay, send)


def misplaced(body: bytes) -> str | None:
    """The sentence for a setting in ``body`` that would be ignored; None where there is none, and
    for what vLLM itself will refuse."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(request, dict):
        return None
    for name, value in request.items():
        bare = name.lower().replace("-", "_").removeprefix("kv_")
        if name == "extra_body" and isinstance(value, Mapping):
            return (
                "extra_body belongs to the OpenAI client, which sends its content in its place; "
                f"over HTTP put {_XARGS} into the request itself"
            )
        if name != _XARGS and isinstance(value, Mapping) and _close(name, [_XARGS]):
            return f"unknown field {shown(name)}; did you mean {_XARGS!r}?"
        if bare in ("sparsity", "budget_tokens") or _close(name, REQUEST_KEYS):
            meant = f"kv_{bare}" if f"kv_{bare}" in REQUEST_KEYS else _close(name, REQUEST_KEYS)[0]
            return (
                f"{shown(name)} is no field of a request; "
                f'put {meant} into {_XARGS}, like "{_XARGS}": {{"{meant}": ...}}'
            )
    return None


def _close(name: str, known: Sequence[str]) -> list[str]:
    return difflib.get_close_matches(name, known, n=1, cutoff=0.8)


async def _answer_400(send: Any, sentence: str) -> None:
    """An error in the form of OpenAI's API."""
    error = {"message": sentence, "type": "BadRequestError", "param": _XARGS, "code": 400}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
