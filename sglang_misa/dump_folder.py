"""What speaks against a folder for dumps, before anything is loaded."""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sglang_misa.config import Dump

LOCK = ".rank-{}.lock"  # held by the rank that writes, until it ends


def taken(folder: Path) -> str:
    """The sentence for a folder of a running server."""
    return f"--misa-dump: expected a folder that no other server writes to, got {folder}; name another"


def unwritable(folder: Path, why: str) -> str:
    """The sentence for a folder in which no dump can be."""
    return f"--misa-dump: expected a folder that can be written, got {folder} ({why}); name another"


def problems(settings: Dump, layers: int | None) -> Iterator[str]:
    """Sentences for a folder that others can read or that cannot be written, and for layers that the model lacks.

    layers: of the model; None where they are not known. A folder is tried by making one in it, or its like in the
    nearest one above it that exists: permissions alone do not tell of file systems that are full, read-only or /proc,
    nor of names that are too long. A link that leads nowhere exists: nothing can be made in its place.
    """
    if (folder := settings.path) is None:
        return
    if str(folder).startswith("~"):
        yield f"--misa-dump: expected a folder of a user of this machine, got {folder}; name another"
        return
    existing = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
    if not os.path.isdir(existing):
        yield f"--misa-dump: expected a folder, got a file or a link to nothing at {existing}; name another"
    elif existing == folder and ((found := folder.stat()).st_uid != os.getuid() or found.st_mode & 0o077):
        got = stat.S_IMODE(found.st_mode)
        yield f"--misa-dump: expected a folder of this user alone, mode 0700, got {got:04o}; chmod 700 {folder}"
    else:
        try:
            with tempfile.TemporaryDirectory(dir=existing) as trial:
                for name in folder.relative_to(existing).parts:
                    Path(trial, name).mkdir(exist_ok=True)
        except OSError as error:
            yield unwritable(folder, f"{error.strerror} in {existing}")
    beyond = [layer for layer in settings.layers or () if layers is not None and not 0 <= layer < layers]
    if beyond:
        listed = ", ".join(map(str, beyond))
        yield f"--misa-dump-layers: expected layers under the model's {layers}, got {listed}; correct them"


def holders(settings: Dump) -> Iterator[str]:
    """The sentence where a server writes to the folder: for a launch, as later its own first rank does."""
    if (folder := settings.path) is None:
        return
    try:
        with (folder / LOCK.format(0)).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield taken(folder)
    except OSError:
        pass  # nobody's, or one that cannot be read, which `problems` tells
