"""Ends that leave nothing behind, whichever signal asks for them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def polite_ends() -> Iterator[None]:
    """A polite kill ends as Ctrl-C does, engines down and finished runs kept; and so does a
    sweep in the background, which shells start with SIGINT ignored."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in handlers:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
