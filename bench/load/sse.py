"""Server-sent events from bytes in any cut."""

from __future__ import annotations

import re

LINE_END = re.compile(rb"\r\n|\n|\r")


class EventTooLarge(Exception):
    """A server sent more bytes without an event than allowed."""


class SseParser:
    """Feed it bytes as they come; it gives back the data of each complete event, still as bytes.

    Works on bytes, so a cut inside a UTF-8 character, a line or a CRLF cannot hurt. Several `data:` lines are joined
    by a newline; comments and other fields are dropped (WHATWG HTML, 9.2.6).
    """

    def __init__(self, max_event_bytes: int):
        self._limit = max_event_bytes
        self._buffer = bytearray()
        self._scanned = 0
        self._data: list[bytes] = []
        self._held = 0

    def feed(self, chunk: bytes) -> list[bytes]:
        """Payloads completed by `chunk`. Raises EventTooLarge."""
        self._buffer += chunk
        events = []
        while (end := LINE_END.search(self._buffer, self._scanned)) is not None:
            if end.group() == b"\r" and end.end() == len(self._buffer):
                break  # it may be the first half of CRLF
            line = bytes(self._buffer[: end.start()])
            del self._buffer[: end.end()]
            self._scanned = 0
            if line.startswith(b"data:"):
                self._data.append(line[6:] if line[5:6] == b" " else line[5:])
                self._held += len(line)
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data, self._held = [], 0
        else:
            self._scanned = len(self._buffer)
        if self._held + len(self._buffer) > self._limit:
            raise EventTooLarge(f"expected events of at most {self._limit} bytes, got a longer one")
        return events

    @property
    def pending(self) -> bool:
        """Whether the stream stands inside an event."""
        return bool(self._buffer.strip() or self._data)
