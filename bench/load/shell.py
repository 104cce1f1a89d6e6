"""The shell around a bench's commands: their command line, interruptions, and what a misuse says."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import Any

import tyro
from pydantic import ValidationError
from rich.console import Console

from sglang_misa.bench.load.settings import LoadError, problem_of

PLAIN_WIDTH = 140  # columns where there is no terminal
OK, GATE_FAILED, USAGE, INVALID, INTERRUPTED = 0, 1, 2, 3, 130


def run(
    command: Any, act: Callable[[Any, Console], int], module: str, arguments: list[str] | None, interrupted: str
) -> int:
    """The exit code of `act` on the command that a command line asks for: USAGE, INTERRUPTED, or what it returns.

    command: what tyro reads, of `module`; arguments: None for the process's own; interrupted: how to go on later.
    """
    width = None if sys.stdout.isatty() else PLAIN_WIDTH
    console = Console(width=width, markup=False)  # what names, logs and servers say is no markup
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        return act(tyro.cli(command, args=arguments, prog=f"python -m {module}"), console)
    except (LoadError, ValidationError) as error:
        told = problem_of(error) if isinstance(error, ValidationError) else error
        Console(stderr=True, markup=False).print(f"error: {told}", style="red", highlight=False, soft_wrap=True)
        return USAGE
    except KeyboardInterrupt:
        console.print(f"interrupted: {interrupted}")
        return INTERRUPTED


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
