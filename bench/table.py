"""Tables: rows added to a CSV, and those of a page in Markdown with the line that says what they were measured on."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Table:
    """A table in Markdown, under a title, with the words that belong to it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def __str__(self) -> str:
        lines = [" | ".join(["", *cells, ""]).strip() for cells in (self.columns, *self.rows)]
        rule = "|" + "---|" * len(self.columns)
        return "\n\n".join(filter(None, [f"### {self.title}", self.note, "\n".join([lines[0], rule, *lines[1:]])]))


def environment(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line of what the rows were measured on."""
    parts = []
    for name, column in (("SGLang", "sglang"), ("torch", "torch"), ("driver", "driver"), ("commit", "commit")):
        values = sorted({row.get(column) or "" for row in rows} - {""})
        parts += [f"{name} {', '.join(values)}"] if values else []
    gpus = ", ".join(dict.fromkeys(row["gpu"] for row in rows))
    return f"{gpus}; {'; '.join(parts)}."


def append(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Add `rows` to a CSV, under the names of its `columns` where it is new, in a folder that need not be there."""
    fresh = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, lineterminator="\n")
        if fresh:
            table.writeheader()
        table.writerows(rows)
