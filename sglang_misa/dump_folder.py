"""What speaks against a folder for dumps, before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator

from sglang_misa.config import Dump


def problems(settings: Dump, layers: int | None) -> Iterator[str]:
    """Sentences for a folder that others can read or that cannot be made, and for layers over the model's `layers`."""
    if (folder := settings.path) is None:
        return
    if folder.exists():
        if not folder.is_dir():
            yield f"--misa-dump: expected a folder, got a file at {folder}; name another"
        elif folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o077:
            mode = folder.stat().st_mode & 0o777
            yield f"--misa-dump: expected a folder of this user alone, mode 0700, got {mode:04o}; chmod 700 {folder}"
    else:
        above = next(each for each in folder.parents if each.exists())
        if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
            yield f"--misa-dump: expected a folder that can be made, got {folder} in {above}; name another"
    beyond = [layer for layer in settings.layers or () if layers is not None and not 0 <= layer < layers]
    if beyond:
        listed = ", ".join(map(str, beyond))
        yield f"--misa-dump-layers: expected layers under the model's {layers}, got {listed}; correct them"
