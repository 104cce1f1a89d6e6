"""Shell of the bench commands: command line, interruptions, and messages for misuse."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import IO, Any, TextIO, cast

import tyro
from pydantic import ValidationError
from rich.console import Console

from sglang_misa.bench.load.settings import LoadError, problem_of
from sglang_misa.outlet import Outlet, kept_stdout

PLAIN_WIDTH = 140  # columns where there is no terminal
OK, GATE_FAILED, USAGE, INVALID, INTERRUPTED = 0, 1, 2, 3, 130


@kept_stdout()
def run(
    command: Any, act: Callable[[Any, Console], int], module: str, arguments: list[str] | None, interrupted: str
) -> int:
    """The exit code of `act` on the command that a command line asks for: USAGE, INTERRUPTED, or what it returns.

    command: what tyro reads, of `module`; arguments: None for the process's own; interrupted: how to go on later.
    """
    console = _console(sys.stdout)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        return act(tyro.cli(command, args=arguments, prog=f"python -m {module}"), console)
    except (LoadError, ValidationError) as error:
        _console(sys.stderr).print(f"error: {problem_of(error)}", style="red", highlight=False, soft_wrap=True)
        return USAGE
    except KeyboardInterrupt:
        console.print(f"interrupted: {interrupted}")
        return INTERRUPTED


def _console(stream: TextIO | None) -> Console:
    """A console on `stream`, None for one that is closed; what names, logs and servers say is no markup or emoji."""
    outlet = Outlet(stream)
    width = None if outlet.isatty() else PLAIN_WIDTH
    return Console(file=cast(IO[str], outlet), width=width, markup=False, emoji=False)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
