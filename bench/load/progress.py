"""Progress of a run: a live bar on a terminal, otherwise a line now and then."""

from __future__ import annotations

import time
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from sglang_misa.bench.load.records import Record

QUIET_S = 10.0  # between lines where there is no terminal
REDRAW_HZ = 4.0  # low, so that drawing does not disturb the event loop


class Live:
    """Phase, done of total, ETA, rates and errors of the unit in progress, under the progress of the whole run."""

    def __init__(self, console: Console, units: int):
        self._console = console
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
            refresh_per_second=REDRAW_HZ,
            disable=not console.is_terminal,
            transient=True,
        )
        self._all = self._bars.add_task("whole run", total=units, note="")
        self._unit = self._bars.add_task("", total=1, note="", visible=False)
        self._units, self._done = units, 0
        self._begun = time.monotonic()
        self._label, self._phase = "", ""
        self._since = self._spoken = time.monotonic()
        self._tokens = self._errors = 0

    def __enter__(self) -> Live:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def expect(self, units: int) -> None:
        """So many units are to come, where that was not known in the beginning."""
        self._units = units

    def unit(self, label: str) -> None:
        """A new unit begins."""
        self._label = label

    def waiting(self, name: str, line: str, seconds: float) -> None:
        """A server is starting; `line` is the last of its log."""
        self._bars.update(
            self._unit, description=f"{name} starting", visible=True, total=None, note=f"{seconds:.0f} s  {line[-60:]}"
        )
        self._say(f"{name} starting, {seconds:.0f} s: {line[-100:]}")

    def request(self, phase: str, done: int, total: int | None, record: Record | None) -> None:
        """A phase began (no record) or one of its requests ended; `total` is None where a duration decides."""
        if record is None or phase != self._phase:
            self._phase, self._since, self._tokens, self._errors = phase, time.monotonic(), 0, 0
            self._bars.reset(self._unit, total=total)
        if record is not None:
            self._tokens += record.output_tokens or 0
            self._errors += not record.good
        seconds = max(time.monotonic() - self._since, 1e-3)
        note = f"{done / seconds:.2f} req/s  {self._tokens / seconds:.0f} tok/s"
        errors = f"  {self._errors} errors" if self._errors else ""
        self._bars.update(
            self._unit,
            description=f"{self._label} · {phase}",
            completed=done,
            total=total,
            visible=True,
            note=f"{note}{errors}",
        )
        left = f", about {seconds / done * (total - done):.0f} s left" if total is not None and 0 < done < total else ""
        of = "" if total is None else f"/{total}"
        self._say(f"[{self._done + 1}/{self._units}] {self._label} · {phase} {done}{of}, {note}{errors}{left}")

    def said(self, line: str) -> None:
        """Something that the user must know at once."""
        self._console.print(line, style="yellow", highlight=False)

    def finished(self, line: str) -> None:
        """The unit is done; `line` sums it up."""
        self._done += 1
        self._units = max(self._units, self._done)  # it goes on where an interval is awaited
        left = (time.monotonic() - self._begun) / self._done * (self._units - self._done)
        note = f"about {timedelta(seconds=round(left))} left" if left else ""
        self._bars.update(self._all, completed=self._done, total=self._units, note=note)
        self._console.print(f"[{self._done}/{self._units}] {line}", highlight=False)

    def _say(self, line: str) -> None:
        if not self._console.is_terminal and time.monotonic() - self._spoken > QUIET_S:
            self._spoken = time.monotonic()
            self._console.print(line, highlight=False, soft_wrap=True)
