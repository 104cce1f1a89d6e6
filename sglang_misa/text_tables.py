"""Tables and ranges in plain text, for terminals without any library."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[Sequence[object]]) -> str:
    """`rows` of equal length as left-aligned columns, the first row as their titles."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    ruled = [cells[0], ["-" * width for width in widths], *cells[1:]]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in ruled)


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers with neighbours as one range: 0-3,7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
