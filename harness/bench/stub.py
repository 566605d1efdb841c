"""A server that does nothing but answer: to measure the client, and to try it out.

``python -m harness.bench.stub --port P`` speaks just enough HTTP/1.1 for the client: a completion
is a canned stream of ``--tokens`` chunks. It parses no JSON, so that it takes as little as possible
of the machine it shares with the client.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import Any

_CHUNK = {"id": "stub", "object": "text_completion", "created": 0, "model": "stub"}
_MODELS = {"data": [{"id": "stub", "root": "stub", "max_model_len": None}]}


def stream(num_tokens: int) -> bytes:
    """The body of a streamed completion of ``num_tokens`` tokens, with usage and ``[DONE]``."""
    choices = [
        {"index": 0, "text": "a", "finish_reason": "length" if i == num_tokens - 1 else None}
        for i in range(num_tokens)
    ]
    usage = {"prompt_tokens": 1, "completion_tokens": num_tokens, "total_tokens": num_tokens + 1}
    events = [json.dumps({**_CHUNK, "choices": [choice]}) for choice in choices]
    events += [json.dumps({**_CHUNK, "choices": [], "usage": usage}), "[DONE]"]
    return b"".join(f"data: {event}\n\n".encode() for event in events)


class StubProtocol(asyncio.Protocol):
    """One connection; requests may arrive in pieces, one after the other."""

    def __init__(self, num_tokens: int) -> None:
        body = stream(num_tokens)
        self._completion = _answer(b"text/event-stream", body)
        self._buffer = b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].lower()
            mark = head.find(b"content-length:")
            length = int(head[mark + 15 :].split(b"\r\n", 1)[0]) if mark >= 0 else 0
            if len(self._buffer) < end + 4 + length:
                return
            path = self._buffer[: self._buffer.index(b"\r\n")].split(b" ")[1]
            self._buffer = self._buffer[end + 4 + length :]
            self._transport.write(self._respond(path))

    def _respond(self, path: bytes) -> bytes:
        if path == b"/v1/completions":
            return self._completion
        if path == b"/v1/models":
            return _answer(b"application/json", json.dumps(_MODELS).encode())
        if path == b"/version":
            return _answer(b"application/json", b'{"version": "stub"}')
        return _answer(b"text/plain", b"")


def _answer(content_type: bytes, body: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n"
    return head % (content_type, len(body)) + body


async def _serve(port: int, num_tokens: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: StubProtocol(num_tokens), "127.0.0.1", port)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> None:
    import uvloop

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=0, help="0: any free one; it is printed")
    parser.add_argument("--tokens", type=int, default=8, help="chunks per answer")
    arguments = parser.parse_args()
    uvloop.run(_serve(arguments.port, arguments.tokens))


if __name__ == "__main__":
    main()
