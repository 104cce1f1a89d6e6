"""Parser of server-sent events, for bytes that arrive in any pieces."""

from __future__ import annotations

import re
from typing import NamedTuple

LINE_END = re.compile(rb"\r\n|\n|\r")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class EventTooLarge(Exception):
    """A server sent more bytes without an event than allowed."""


class Event(NamedTuple):
    """Name (empty for a plain message) and data of one event, still as bytes."""

    name: bytes
    data: bytes


class SseParser:
    """Feed it bytes as they come; it gives back each complete event.

    Works on bytes, so a cut inside a UTF-8 character, a line or a CRLF cannot hurt. Several `data:` lines are joined
    by a newline; a leading byte order mark, comments, other fields and events without data (heartbeats) are dropped
    (WHATWG HTML, 9.2.6).
    """

    def __init__(self, max_event_bytes: int):
        self._limit = max_event_bytes
        self._buffer = bytearray()
        self._scanned = 0
        self._begun = False
        self._after_cr = False  # a line ended with CR: a line feed that follows belongs to it
        self._name = b""
        self._data: list[bytes] = []
        self._held = 0

    def feed(self, chunk: bytes) -> list[Event]:
        """Events completed by `chunk`. Raises EventTooLarge."""
        self._buffer += chunk
        if not self._begun:
            if len(self._buffer) < len(BYTE_ORDER_MARK) and BYTE_ORDER_MARK.startswith(self._buffer):
                return []
            self._begun = True
            if self._buffer.startswith(BYTE_ORDER_MARK):
                del self._buffer[: len(BYTE_ORDER_MARK)]
        events = []
        if self._after_cr and self._buffer:
            if self._buffer.startswith(b"\n"):
                del self._buffer[:1]
            self._after_cr = False
        while (end := LINE_END.search(self._buffer, self._scanned)) is not None:
            line = bytes(self._buffer[: end.start()])
            self._after_cr = end.group() == b"\r" and end.end() == len(self._buffer)
            del self._buffer[: end.end()]  # after this, the match no longer reads what it found
            self._scanned = 0
            if not line:
                events += self._take()
                continue
            field, _, value = line.partition(b":")
            value = value.removeprefix(b" ")
            if field == b"data":
                self._data.append(value)
                self._held += len(line)
            elif field == b"event":
                self._name = value
        else:
            self._scanned = len(self._buffer)
        if self._held + len(self._buffer) > self._limit:
            raise EventTooLarge(f"expected events of at most {self._limit} bytes, got a longer one")
        return events

    def close(self) -> list[Event]:
        """The last event, where the stream ended with its lines but without the blank one behind them."""
        return [] if self._buffer else self._take()

    def _take(self) -> list[Event]:
        told = any(self._data) or (self._data and self._name)
        taken = [Event(self._name, b"\n".join(self._data))] if told else []
        self._name, self._data, self._held = b"", [], 0
        return taken

    @property
    def pending(self) -> bool:
        """Whether the stream stands inside an event."""
        return bool(self._buffer.strip() or self._data)
