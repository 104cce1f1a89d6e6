"""What this package raises where it cannot do as asked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar


class Refusal(Exception):
    """`problems` holds one sentence for each reason: expected, got, what to do."""

    opening: ClassVar[str]  # of the message, before the reasons

    def __init__(self, problems: Iterable[str]):
        self.problems = list(problems)
        super().__init__(f"{self.opening}:\n" + "\n".join(f"  - {problem}" for problem in self.problems))

    @classmethod
    def raise_if(cls, problems: Iterable[str]) -> None:
        """Raise when there is any problem, with all of them."""
        if found := list(problems):
            raise cls(found)
