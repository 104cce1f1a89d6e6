"""The commit that a figure belongs to."""

from __future__ import annotations

import subprocess
from pathlib import Path

LIMIT_S = 5.0  # for git, on a slow disk


def commit() -> str:
    """The commit of the checkout that this file lies in, `-dirty` for a changed tree; empty in an installed package."""
    here = Path(__file__).resolve()
    try:
        _git(here.parent, "ls-files", "--error-unmatch", here.name)  # a virtual environment may lie in a checkout
        return _git(here.parent, "describe", "--always", "--dirty", "--match=-")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True).stdout.strip()
