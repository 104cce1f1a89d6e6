"""A table in Markdown, and the line that says what its rows were measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    return f"{rows[0]['gpu']}; {'; '.join(parts)}."
