"""Server-sent events, incrementally (WHATWG HTML, section 9.2). Pure."""

from __future__ import annotations


class EventParser:
    """Bytes in as they arrive, ``data`` payloads out.

    Lines end with LF, CRLF or CR; an empty line ends an event; comments and other fields are
    skipped; several ``data`` lines are joined with LF.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> list[bytes]:
        """Payloads of the events that ``chunk`` completes."""
        buffer = self._rest + chunk
        if b"\r" in buffer:
            # A CR at the very end may be half of a CRLF: it waits for the next chunk.
            held = b"\r" if buffer.endswith(b"\r") else b""
            buffer = buffer[: len(buffer) - len(held)]
            buffer = buffer.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        else:
            held = b""
        *lines, rest = buffer.split(b"\n")
        self._rest = rest + held
        events = []
        for line in lines:
            if line:
                if line.startswith(b"data:"):
                    self._data.append(line[6:] if line.startswith(b"data: ") else line[5:])
            elif self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events

    @property
    def unfinished(self) -> bool:
        """Whether an event has begun that no empty line has ended."""
        return bool(self._rest or self._data)
