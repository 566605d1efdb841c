"""A server that misbehaves on demand: ``python -m tests.unit.serving_stub MODE --port P``."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import threading
from contextlib import contextmanager

from aiohttp import web

METRICS = """vllm:num_preemptions_total{engine="0"} %d
vllm:num_requests_running{engine="0"} 2.0
vllm:num_requests_waiting{engine="0"} 0.0
vllm:kv_cache_usage_perc{engine="0"} 0.5
vllm:cache_config_info{block_size="32",kv_cache_memory_bytes="1048576",num_gpu_blocks="10"} 1.0
"""

GATHERED = 120
"""Requests that ``gather`` waits for before it answers any."""


def chunk(text="a", finish=None):
    body = {"choices": [{"index": 0, "text": text, "finish_reason": finish}]}
    return f"data: {json.dumps(body)}\n\n".encode()


def usage(tokens):
    return f'data: {{"choices": [], "usage": {{"completion_tokens": {tokens}}}}}\n\n'.encode()


LAST_WORDS = {
    # How an answer to N tokens ends: tokens that are sent, finish reason, usage.
    "abort": (lambda n: n, "abort", lambda n: n),
    "error_finish": (lambda n: 2, "error", lambda n: 2),
    "eos": (lambda n: 3, "stop", lambda n: 3),
    "short": (lambda n: 3, "length", lambda n: 3),
    "stop_at_the_end": (lambda n: n, "stop", lambda n: n),
    "too_many": (lambda n: n + 4, "length", lambda n: n + 4),
    "two_a_chunk": (lambda n: 3, "length", lambda n: n),
    "no_usage": (lambda n: 3, "length", lambda n: None),
    "odd_usage": (lambda n: n, "length", lambda n: '"many"'),
}


class Stub:
    """``mode``: ``good``, or what goes wrong with every request from number ``after`` on.

    Each request preempts one. ``pages``: bodies by path, instead of the stub's own; ``api_key``:
    what every request must carry; ``on_request``: called by every completion.
    """

    def __init__(self, mode="good", after=0, pages=None, api_key=None):
        self.mode, self.after, self.count = mode, after, 0
        self.pages, self.api_key = pages or {}, api_key
        self.on_request = lambda: None
        self.bodies = []
        self.paths_with_key = set()

    @web.middleware
    async def front_door(self, request, handler):
        if self.api_key:
            if request.headers.get("Authorization") == f"Bearer {self.api_key}":
                self.paths_with_key.add(request.path)
            elif request.path != "/health":  # open, as vLLM's own is
                return web.Response(status=401)
        if request.path in self.pages:
            return web.Response(text=self.pages[request.path], content_type="text/html")
        return await handler(request)

    def app(self):
        app = web.Application(middlewares=[self.front_door])
        app.router.add_post("/v1/completions", self.completions)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/health", self.health)
        app.router.add_get("/metrics", self.metrics)
        return app

    async def models(self, request):
        if self.mode == "no_models":
            raise web.HTTPInternalServerError
        return web.json_response({"data": [{"id": "stub", "max_model_len": 4096}]})

    async def health(self, request):
        return web.Response()

    async def metrics(self, request):
        return web.Response(text=METRICS % self.count)

    async def completions(self, request):
        body = await request.json()
        self.bodies.append(body)
        self.count += 1
        self.on_request()
        mode = self.mode if self.count > self.after else "good"
        if not body.get("stream"):  # log-probs were asked for
            return web.json_response({"choices": [{}], "usage": {"completion_tokens": 1}})
        if mode == "http_500":
            return web.json_response({"error": {"message": "the engine is on fire"}}, status=500)
        if mode == "die":
            os._exit(9)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        tokens = body["max_tokens"]
        if mode in LAST_WORDS:
            sent, reason, counted = LAST_WORDS[mode]
            for i in range(sent(tokens)):
                await response.write(chunk(finish=reason if i == sent(tokens) - 1 else None))
            if (n := counted(tokens)) is not None:
                await response.write(usage(n))
            await response.write(b"data: [DONE]\n\n")
            return response
        for i in range(tokens):
            if i == 2 and mode == "close":
                request.transport.abort()
                return response
            if i == 2 and mode == "malformed":
                await response.write(b"data: {half a chu\n\n")
                return response
            if i == 2 and mode == "error_event":
                await response.write(b'data: {"error": {"message": "out of luck"}}\n\n')
                return response
            if mode == "hang":
                await asyncio.sleep(60)
            while mode == "gather" and self.count < GATHERED:
                await asyncio.sleep(0.01)
            await response.write(chunk(finish="length" if i == tokens - 1 else None))
            if mode == "slow":
                await asyncio.sleep(0.2)
        await response.write(usage(tokens))
        if mode != "no_done":
            await response.write(b"data: [DONE]\n\n")
        return response


@contextmanager
def running(mode="good", after=0, **options):
    """A stub in a thread of this process: (its address, the stub)."""
    stub = Stub(mode, after, **options)
    loop = asyncio.new_event_loop()
    started = threading.Event()
    address = []

    async def start():
        runner = web.AppRunner(stub.app(), shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        address.append(f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}")
        return runner

    def serve():
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(start())
        loop.call_soon(started.set)  # a stop that came before would be lost
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    started.wait(10)
    try:
        yield address[0], stub
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def load(address, folder, *arguments, requests=6):
    """``kv-eviction load`` on a stub: exit status, and the record if there is one."""
    from harness.cli import main as cli  # not in a stub's own process: it takes a second to import

    output = folder / "record.json"
    status = cli(
        [
            "load",
            "--base-url",
            address,
            "--output",
            str(output),
            "--num-requests",
            str(requests),
            "--vocab-size",
            "100",
            "--input-length",
            "4",
            "--output-length",
            "5",
            "--request-rate",
            "50",
            *arguments,
        ]
    )
    return status, json.loads(output.read_text()) if output.exists() else None


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("mode")
    parser.add_argument("--after", type=int, default=0)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--api-key")
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    if arguments.mode == "no_start":
        print("ValueError: this model cannot be served")
        raise SystemExit(3)
    if arguments.mode == "never_ready":
        threading.Event().wait()
    stub = Stub(arguments.mode, arguments.after, api_key=arguments.api_key)
    web.run_app(stub.app(), host=arguments.host, port=arguments.port, print=None)


if __name__ == "__main__":
    main()
