"""What speaks against a folder for dumps, before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from sglang_misa.config import Dump


def problems(settings: Dump, layers: int | None) -> Iterator[str]:
    """Sentences for a folder that others can read, or none at all, and for `layers` that the model does not have."""
    if settings.folder is None:
        return
    folder = Path(settings.folder)
    if folder.exists():
        if not folder.is_dir():
            yield f"--misa-dump: expected a folder, got a file at {folder}; name another"
        elif folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o077:
            mode = folder.stat().st_mode & 0o777
            yield f"--misa-dump: expected a folder of this user alone, mode 0700, got {mode:04o}; chmod 700 {folder}"
    beyond = [layer for layer in settings.layers or () if layers is not None and not 0 <= layer < layers]
    if beyond:
        listed = ", ".join(map(str, beyond))
        yield f"--misa-dump-layers: expected layers under the model's {layers}, got {listed}; correct them"
