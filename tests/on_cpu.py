"""CUDA sources compiled by g++ for the CPU with the stand-ins of kernels/simt for threads and Hopper, and calls."""

import ctypes
import pathlib
import shutil
import subprocess
from typing import Any

import numpy as np
import pytest

from sglang_misa.kernels import build

HERE = pathlib.Path(__file__).parent / "kernels/simt"
SOURCES = pathlib.Path(build.__file__).parent / "csrc/sm90"
COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler: g++")


def device_sources(folder: pathlib.Path, source: str) -> None:
    """Copy the device parts of a source: C++ compilers cannot read the launches that follow a line `---- host`."""
    for path in [*SOURCES.glob("*.cuh"), SOURCES / f"{source}.cu"]:
        device, _, host = path.read_text().replace("extern __shared__", "extern").partition("// ---- host")
        closed = "}\n" * (device.count("\nnamespace ") if host else 0)
        (folder / path.name).write_text(device + closed)
    for stand_in in HERE.iterdir():
        shutil.copy(stand_in, folder)


def compiled(folder: pathlib.Path, source: str, **shape: int) -> ctypes.CDLL:
    """The device parts of a source as a library, for one shape."""
    device_sources(folder, source)
    library = folder / f"{source}.so"
    # Libraries built with other flags are not to share the "shared memory" of a function of the same name.
    # And a checked longjmp takes another fiber's stack for a broken one.
    options = ["-std=c++20", "-O2", "-w", "-shared", "-fPIC", "-fno-gnu-unique", "-U_FORTIFY_SOURCE"]
    compiler = ["g++", *options, f"-I{folder}", *build.definitions(shape), "-o", library]
    subprocess.run([*compiler, folder / f"{source}.cpp"], check=True)
    return ctypes.CDLL(str(library))


def call(function: Any, *arguments: Any) -> None:
    """Run a kernel; arrays go as addresses, None as null, floats in single precision."""
    converted = [
        ctypes.c_void_p(a.ctypes.data if isinstance(a, np.ndarray) else None)
        if a is None or isinstance(a, np.ndarray)
        else ctypes.c_float(a)
        if isinstance(a, float)
        else ctypes.c_int64(a)
        for a in arguments
    ]
    function.restype = ctypes.c_bool
    assert function(*converted), "some threads of a block could not go on, or a copy was not aligned"


def aligned(values: Any, dtype: Any, line: int = 16) -> np.ndarray:
    """A copy at an address that `line` divides, 16 bytes behind it and no border of 4 GiB inside (see scratch_of)."""
    values = np.asarray(values, dtype)
    crossing = []
    while True:
        room = np.zeros(values.nbytes + 16 + 2 * line, np.uint8)
        first = room.ctypes.data
        if first >> 32 == (first + len(room)) >> 32:
            break
        crossing.append(room)  # held, or the next one would be the same
    start = -first % line
    held = room[start : start + values.nbytes].view(dtype).reshape(values.shape)
    held[...] = values
    return held


def ints(values: Any) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=np.int32)
