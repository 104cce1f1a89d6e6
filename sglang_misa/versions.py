"""Versions of SGLang: the one that is installed."""

from __future__ import annotations

from importlib import metadata


def installed() -> str:
    """The version of the installed SGLang. Raises PackageNotFoundError without one."""
    return metadata.version("sglang")
