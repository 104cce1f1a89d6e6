"""Builds CUDA sources for the CPU (kernels/simt) and calls what they export."""

import ctypes
import pathlib
import shutil
import subprocess

import numpy as np

from sglang_misa.kernels import layout

HERE = pathlib.Path(__file__).parent / "kernels/simt"
SOURCES = pathlib.Path(layout.__file__).parent / "csrc/sm90"


def compiled(folder: pathlib.Path, source: str, *flags: str) -> ctypes.CDLL:
    """The device parts of a source: C++ compilers cannot read the launches that follow their line `---- host`."""
    for path in [*SOURCES.glob("*.cuh"), SOURCES / f"{source}.cu"]:
        device, _, host = path.read_text().replace("extern __shared__", "extern").partition("// ---- host")
        (folder / path.name).write_text(device + ("}  // namespace misa\n" if host else ""))
    for stand_in in HERE.iterdir():
        shutil.copy(stand_in, folder)
    library = folder / f"{source}.so"
    compiler = ["g++", "-std=c++20", "-O2", "-w", "-shared", "-fPIC", f"-I{folder}", *flags, "-o", library]
    subprocess.run([*compiler, folder / f"{source}.cpp"], check=True)
    return ctypes.CDLL(str(library))


def call(function, *arguments) -> None:
    """Run a kernel; arrays go as addresses, None as null, floats in single precision."""
    converted = [
        ctypes.c_void_p(a.ctypes.data if isinstance(a, np.ndarray) else None)
        if a is None or isinstance(a, np.ndarray)
        else ctypes.c_float(a)
        if isinstance(a, float)
        else ctypes.c_int64(a)
        for a in arguments
    ]
    assert function(*converted), "some threads of a block could not go on, or a copy was not aligned"


def aligned(values, dtype) -> np.ndarray:
    """A copy at an address that 16 divides, with 16 bytes behind it and no border of 4 GiB inside (see scratch_of)."""
    values = np.asarray(values, dtype)
    crossing = []
    while True:
        room = np.zeros(values.nbytes + 48, np.uint8)
        first = room.ctypes.data
        if first >> 32 == (first + len(room)) >> 32:
            break
        crossing.append(room)  # held, or the next one would be the same
    start = -first % 16
    held = room[start : start + values.nbytes].view(dtype).reshape(values.shape)
    held[...] = values
    return held
