"""Sends one request and takes down what happens. Every outcome is a ``Result``, never an error."""

from __future__ import annotations

import asyncio
import errno
import json
import time
from typing import Any

import aiohttp
from yarl import URL

from .answer import MALFORMED, count, error_message, log_likelihoods, shortcoming, take_chunk
from .load_plan import QUALITY, PlannedRequest
from .result import FAILED, INCOMPLETE, SUCCEEDED, TIMED_OUT, Result
from .sse import EventParser
from .target import authorization

_KEEP_ALIVE_S = 3.0
"""Below uvicorn's five seconds: a connection is never reused while the server closes it."""
_MESSAGE_LIMIT = 300


class Client:
    """Speaks the OpenAI completions API to one server, over as many connections as it takes."""

    def __init__(self, base_url: str, timeout_s: float, api_key: str | None = None) -> None:
        self._url = URL(base_url.rstrip("/") + "/v1/completions")
        self._timeout_s = timeout_s
        self._headers = {"Content-Type": "application/json", **authorization(api_key)}
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
            _break_off(result, TIMED_OUT, "timed_out", f"no end within {self._timeout_s:g} s")
        except asyncio.CancelledError:
            _break_off(result, INCOMPLETE, "interrupted", "the run was stopped")
        except (aiohttp.ClientError, OSError) as error:
            _break_off_by_connection(result, error)
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
                _break_off(result, FAILED, f"http_{response.status}", error_message(text))
            elif result.kind == QUALITY:
                _take_answer(result, request, await response.read())
            else:
                await _take_stream(result, request, response, start)


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


async def _take_stream(
    result: Result, request: PlannedRequest, response: aiohttp.ClientResponse, start: float
) -> None:
    parser = EventParser()
    tokens = reason = None
    done = False
    async for data in response.content.iter_any():
        now = time.perf_counter() - start
        for event in parser.feed(data):
            if event == b"[DONE]":
                done = True
                continue
            try:
                chunk = take_chunk(event)
            except MALFORMED:
                text = event.decode(errors="replace")
                _break_off(result, FAILED, "malformed_stream", f"not a completion chunk: {text}")
                return
            if chunk.error:
                _break_off(result, FAILED, "error_in_stream", chunk.error)
                return
            if chunk.has_choice:
                result.chunks.append(now)
            reason = chunk.finish_reason or reason
            if chunk.usage:
                tokens = chunk.output_tokens
                result.prompt_tokens = chunk.prompt_tokens or result.prompt_tokens
    if not done or reason is None:
        where = "in the middle of an event" if parser.unfinished else "without [DONE]"
        what = where if not done else "without a finish reason"
        _break_off(result, INCOMPLETE, "stream_ended", f"the stream ended {what}", tokens)
        return
    _judge(result, request, reason, tokens)


def _take_answer(result: Result, request: PlannedRequest, data: bytes) -> None:
    try:
        answer = json.loads(data)
        reason = answer["choices"][0].get("finish_reason")
        usage = answer.get("usage")
        tokens = count(usage["completion_tokens"]) if usage else None
        # An answer that was cut off may well be without them: that is the better reason.
        if reason is None or not shortcoming(reason, tokens, request.output_length):
            log_likelihoods(answer, request.prompt)
    except MALFORMED:
        text = data.decode(errors="replace")
        _break_off(result, FAILED, "malformed_answer", f"no prompt log-probs in: {text}")
        return
    result.answer = answer
    _judge(result, request, reason, tokens)


def _judge(result: Result, request: PlannedRequest, reason: Any, tokens: int | None) -> None:
    """An answer that came to its end succeeded if it is all that was asked for."""
    result.output_tokens = tokens
    if wrong := shortcoming(reason, tokens, request.output_length):
        _end(result, *wrong)
    else:
        result.status = SUCCEEDED


def _end(result: Result, status: str, error: str, message: str) -> None:
    result.status, result.error = status, error
    result.message = " ".join(message.split())[:_MESSAGE_LIMIT]


def _break_off(
    result: Result, status: str, error: str, message: str, tokens: int | None = None
) -> None:
    """End an answer that stopped before its last word; its chunks stand in for a count."""
    _end(result, status, error, message)
    result.counted_by_chunks = tokens is None and bool(result.chunks)
    result.output_tokens = len(result.chunks) if tokens is None else tokens


def _break_off_by_connection(result: Result, error: Exception) -> None:
    if isinstance(error, aiohttp.ClientConnectorError):
        refused = error.os_error.errno == errno.ECONNREFUSED
        kind = "connection_refused" if refused else "connection_failed"
        _break_off(result, FAILED, kind, str(error))
    elif isinstance(error, aiohttp.ClientPayloadError) or result.chunks:
        _break_off(result, INCOMPLETE, "connection_closed", f"closed mid-stream: {error}")
    else:
        _break_off(result, FAILED, "connection_closed", str(error) or type(error).__name__)
