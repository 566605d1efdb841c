"""Sends one request and takes down what happens. Every outcome is a ``Result``, never an error."""

from __future__ import annotations

import asyncio
import errno
import json
import time
from typing import Any

import aiohttp
from yarl import URL

from .plan import QUALITY, PlannedRequest
from .quality import log_likelihoods
from .result import FAILED, INCOMPLETE, SUCCEEDED, TIMED_OUT, Result
from .sse import EventParser

_KEEP_ALIVE_S = 3.0
"""Below uvicorn's five seconds: a connection is never reused while the server closes it."""
_MESSAGE_LIMIT = 300
_decode = json.JSONDecoder().decode


class Client:
    """Speaks the OpenAI completions API to one server, over as many connections as it takes."""

    def __init__(self, base_url: str, timeout_s: float, api_key: str | None = None) -> None:
        self._url = URL(base_url.rstrip("/") + "/v1/completions")
        self._timeout_s = timeout_s
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        trace = aiohttp.TraceConfig()
        trace.on_request_chunk_sent.append(_on_body_sent)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None),
            trace_configs=[trace],
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def close(self) -> None:
        await self._session.close()

    async def send(self, request: PlannedRequest, body: bytes, start: float) -> Result:
        """Send ``body`` now; ``start`` is the run's start on ``time.perf_counter``."""
        result = Result(request.index, request.kind, request.send_at, window=request.window)
        result.prompt_tokens = len(request.prompt)
        result.sent = time.perf_counter() - start
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._exchange(result, request, body, start)
        except TimeoutError:
            _end(result, TIMED_OUT, "timed_out", f"no end within {self._timeout_s:g} s")
        except asyncio.CancelledError:
            _end(result, INCOMPLETE, "interrupted", "the run was stopped")
        except (aiohttp.ClientError, OSError) as error:
            _end_by_connection(result, error)
        result.end = time.perf_counter() - start
        return result

    async def _exchange(
        self, result: Result, request: PlannedRequest, body: bytes, start: float
    ) -> None:
        async with self._session.post(
            self._url, data=body, headers=self._headers, trace_request_ctx=(result, start)
        ) as response:
            if response.status != 200:
                text = await response.text(errors="replace")
                _end(result, FAILED, f"http_{response.status}", _error_message(text))
            elif result.kind == QUALITY:
                _take_answer(result, request.prompt, await response.read())
            else:
                await _take_stream(result, response, start)


def encode(request: PlannedRequest, model: str, settings: dict[str, Any]) -> bytes:
    """The body of a request, made before the run so that encoding delays no sending.

    Load: streamed, exactly ``output_length`` tokens, greedy. Quality: prompt log-probs of the
    window, one token.
    """
    body: dict[str, Any] = {
        "model": model,
        "prompt": request.prompt,
        "max_tokens": request.output_length,
        "temperature": 0.0,
        "ignore_eos": True,
    }
    if request.kind == QUALITY:
        body["prompt_logprobs"] = 0
    else:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if settings:
        body["vllm_xargs"] = settings
    return json.dumps(body, separators=(",", ":")).encode()


async def _on_body_sent(session: Any, context: Any, parameters: Any) -> None:
    """The body has gone to the socket: that is when a request is sent."""
    result, start = context.trace_request_ctx
    result.sent = time.perf_counter() - start


async def _take_stream(result: Result, response: aiohttp.ClientResponse, start: float) -> None:
    parser = EventParser()
    finished = done = False
    async for data in response.content.iter_any():
        now = time.perf_counter() - start
        for event in parser.feed(data):
            if event == b"[DONE]":
                done = True
                continue
            try:
                chunk = _decode(event.decode())
                choices, usage, error = (
                    chunk.get("choices"),
                    chunk.get("usage"),
                    chunk.get("error"),
                )
                if choices:
                    result.chunks.append(now)
                    finished = finished or choices[0].get("finish_reason") is not None
                if usage:
                    result.output_tokens = usage["completion_tokens"]
                    result.prompt_tokens = usage.get("prompt_tokens") or result.prompt_tokens
            except (ValueError, TypeError, AttributeError, KeyError, IndexError):
                text = event.decode(errors="replace")
                _end(result, FAILED, "malformed_stream", f"not a completion chunk: {text}")
                return
            if error:
                _end(result, FAILED, "error_in_stream", _error_message(event.decode()))
                return
    # The server's count comes last; a stream that broke off counts what arrived.
    result.output_tokens = result.output_tokens or len(result.chunks)
    if done and finished and result.chunks:
        result.status = SUCCEEDED
    else:
        what = "[DONE]" if not done else "a finish reason"
        _end(result, INCOMPLETE, "stream_ended", f"the stream ended without {what}")


def _take_answer(result: Result, prompt: list[int], data: bytes) -> None:
    try:
        result.answer = json.loads(data)
        result.output_tokens = result.answer["usage"]["completion_tokens"]
        log_likelihoods(result.answer, prompt)
    except (ValueError, TypeError, AttributeError, KeyError, IndexError):
        text = data.decode(errors="replace")
        _end(result, FAILED, "malformed_answer", f"no prompt log-probs in: {text}")
        return
    result.status = SUCCEEDED


def _end(result: Result, status: str, error: str, message: str) -> None:
    result.status, result.error = status, error
    result.message = " ".join(message.split())[:_MESSAGE_LIMIT]
    result.output_tokens = result.output_tokens or len(result.chunks)


def _end_by_connection(result: Result, error: Exception) -> None:
    if isinstance(error, aiohttp.ClientConnectorError):
        refused = error.os_error.errno == errno.ECONNREFUSED
        kind = "connection_refused" if refused else "connection_failed"
        _end(result, FAILED, kind, str(error))
    elif isinstance(error, aiohttp.ClientPayloadError) or result.chunks:
        _end(result, INCOMPLETE, "connection_closed", f"closed mid-stream: {error}")
    else:
        _end(result, FAILED, "connection_closed", str(error) or type(error).__name__)


def _error_message(text: str) -> str:
    """The sentence in an OpenAI error body, or the body."""
    try:
        body = json.loads(text)
        return str(body.get("error", body)["message"])
    except (ValueError, TypeError, KeyError, AttributeError):
        return text or "no message"
