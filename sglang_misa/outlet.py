"""Standard output that outlives its reader: what a program does, and how it ends, does not depend on who looks on."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

UNTOLD = 2  # exit status: what every program ends with that cannot do as asked


class Outlet:
    """A stream that becomes /dev/null where it fails: where its reader goes or, for a run of hours, its disk is full.

    stream: None for one that is closed; forgiven: what of its errors is no reason to stop.
    """

    failed: OSError | None = None  # that was not forgiven

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
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if not isinstance(error, self._forgiven):
                self.failed = error
                raise


@contextmanager
def kept_stdout() -> Iterator[None]:
    """Go on where the reader of standard output leaves: `program | grep -q` ends with the program's own status.

    Where its disk is full, what a program found is lost: it ends with UNTOLD and a sentence.
    """
    outlet = Outlet(sys.stdout, BrokenPipeError)
    with contextlib.redirect_stdout(cast(TextIO, outlet)):
        try:
            try:
                yield
            finally:
                outlet.flush()
        except OSError as error:
            if error is not outlet.failed:
                raise
            print(f"standard output: expected to write to it, got {error}; make room, or redirect it", file=sys.stderr)
            raise SystemExit(UNTOLD) from None
