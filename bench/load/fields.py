"""Typed access to the fields of a server's JSON, in which any name may hold anything."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

Data = Mapping[str, Any]
MOST = 2**31 - 1  # that a count or a token id may be
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"  # a number in a text


class FieldError(ValueError):
    """A field of another kind than its name says."""


def text(data: Data, name: str) -> str:
    """A text; empty where there is none."""
    return _field(data, name, lambda v: isinstance(v, str), "a text") or ""


def mapping(data: Data, name: str) -> dict[str, Any]:
    """An object; empty where there is none."""
    return _field(data, name, lambda v: isinstance(v, dict), "an object") or {}


def mappings(data: Data, name: str) -> list[dict[str, Any]]:
    """A list of objects; empty where there is none."""
    fits = "a list of objects"
    return _field(data, name, lambda v: isinstance(v, list) and all(isinstance(o, dict) for o in v), fits) or []


def counts(data: Data, name: str) -> list[int]:
    """A list of whole numbers; empty where there is none."""
    fits = "a list of whole numbers"
    return _field(data, name, lambda v: isinstance(v, list) and all(map(_is_count, v)), fits) or []


def count(data: Data, name: str, default: int | None = None) -> int | None:
    """A whole number from 0 to MOST; `default` where there is none."""
    value: int | None = _field(data, name, _is_count, "a whole number, not negative")
    return default if value is None else value


def number(data: Data, name: str, default: float | None = None) -> float | None:
    """A finite number; `default` where there is none."""
    value: float | None = _field(data, name, _is_number, "a finite number")
    return default if value is None else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST


def _field(data: Data, name: str, fits: Callable[[Any], bool], wanted: str) -> Any:
    """None where it is null or missing. Raises FieldError."""
    if not isinstance(data, Mapping):
        raise FieldError(f"expected an object with {name}, got {str(data)[:80]!r}")
    value = data.get(name)
    if value is None or fits(value):
        return value
    raise FieldError(f"expected {name} to be {wanted}, got {str(value)[:80]!r}")
