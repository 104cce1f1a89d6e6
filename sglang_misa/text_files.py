"""Texts and JSON Lines that a user names: every program reads them here, and refuses them in the same words.

`refused` makes of a sentence (file and line, expected, got, what to do) the exception that the program raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sglang_misa.validation import ConfigError, parsed_object

Refused = Callable[[str], Exception]


def read(path: Path, refused: Refused) -> str:
    """The text of a file in UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise refused(f"{path}: expected a readable UTF-8 file, got {error}; name another") from None


def json_lines(path: Path, refused: Refused) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, object) of each line that is not blank."""
    for number, line in enumerate(read(path, refused).split("\n"), 1):  # a text may hold what else ends one for Unicode
        if line.strip():
            where = f"{path}:{number}"
            try:
                yield where, parsed_object(line, where)
            except ConfigError as error:
                raise refused(error.problems[0]) from None


def prompts(path: Path, refused: Refused) -> Iterator[str]:
    """The `prompt` or `text` of each line of a .jsonl file; of any other file the text, which is one prompt."""
    if path.suffix != ".jsonl":
        yield read(path, refused)
        return
    for where, row in json_lines(path, refused):
        text = row.get("prompt", row.get("text"))
        if not isinstance(text, str):
            raise refused(f'{where}: expected a text as "prompt" or "text", got {sorted(row)}; rename the field')
        yield text
