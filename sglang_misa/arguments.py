"""Types of command line arguments, for argparse: what is wrong with a word is said before any work is done."""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from sglang_misa.validation import ConfigError

PICTURES = (".png", ".svg", ".pdf")


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are ConfigErrors of one sentence."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError, where argparse prints the usage and exits."""
        raise ConfigError([f"{message.removeprefix('argument ')}; see --help"])


def at_least(least: int) -> Callable[[str], int]:
    """The type of whole numbers from `least` on."""

    def number(word: str) -> int:
        try:
            value = int(word)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of {least} or more, got {word!r}; correct it")
        return value

    return number


def file_to_write(word: str) -> Path:
    """A file that can be written, tried by opening it: permissions do not tell of long names, or of /proc."""
    path = Path(os.path.expanduser(word))
    new = not os.path.lexists(path)
    try:
        path.open("a").close()
        if new:
            path.unlink()
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"expected a file that can be written, got {word!r} ({error.strerror}); change it"
        ) from None
    return path


def picture(word: str) -> Path:
    """A picture to write, by its ending. Raises ModuleNotFoundError without matplotlib, which draws it."""
    path = file_to_write(word)
    if path.suffix.lower() not in PICTURES:
        raise argparse.ArgumentTypeError(f"expected a file that ends in {', '.join(PICTURES)}, got {word!r}; rename it")
    importlib.import_module("matplotlib")
    return path


def device(word: str) -> str:
    """`cpu`, or a CUDA device of this machine."""
    import torch

    kind, _, number = word.partition(":")
    if word != "cpu":
        count = torch.cuda.device_count()
        if kind != "cuda" or not (number or "0").isdecimal() or int(number or 0) >= count:
            raise argparse.ArgumentTypeError(
                f"expected cpu, or cuda with one of the {count} GPUs here, got {word!r}; choose one"
            )
    return word
