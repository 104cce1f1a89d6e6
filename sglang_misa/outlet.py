"""Standard output that outlives its reader: what a program does, and how it ends, does not depend on who looks on."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast


class Outlet:
    """A stream that becomes /dev/null where it fails: where its reader goes or, for a run of hours, its disk is full.

    stream: None for one that is closed; forgiven: what of its errors is no reason to stop.
    """

    def __init__(self, stream: TextIO | None, forgiven: type[OSError] = OSError):
        self._forgiven = forgiven
        self._stream = stream if stream is not None else open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        if isinstance(self._stream, io.TextIOWrapper):
            self._stream.reconfigure(errors="replace")  # not every terminal can write what a name may hold

    def write(self, text: str) -> int:
        with self._kept():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._kept():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except self._forgiven:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextmanager
def kept_stdout() -> Iterator[None]:
    """Go on where the reader of standard output leaves: `program | grep -q` ends with the program's own status."""
    outlet = Outlet(sys.stdout, BrokenPipeError)
    with contextlib.redirect_stdout(cast(TextIO, outlet)):
        try:
            yield
        finally:
            outlet.flush()
