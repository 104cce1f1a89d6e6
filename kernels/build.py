"""CUDA sources, built at first use."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


@functools.cache
def build(source: str, **shape: int) -> Any:
    """The functions that csrc/sm90/`source`.cu exports for a shape, by the names of shape.cuh in small letters.

    Compiled with nvcc for sm_90a at first use and kept in tvm-ffi's cache, under the digest of its sources.
    """
    from tvm_ffi.cpp import load

    here = Path(__file__).resolve().parent / "csrc/sm90"
    sources = [here / f"{source}.cu", *sorted(here.glob("*.cuh"))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    name = "_".join(["misa", source, digest, *(f"{key}{int(value)}" for key, value in shape.items())])
    key, before = "TVM_FFI_CUDA_ARCH_LIST", os.environ.get("TVM_FFI_CUDA_ARCH_LIST")
    os.environ[key] = "9.0a"  # wgmma and setmaxnreg exist under this name alone
    try:
        return load(
            name,
            cuda_files=[str(sources[0])],
            extra_cuda_cflags=["-O3", *definitions(shape)],
            extra_include_paths=[str(here)],
        )
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


@functools.cache
def resident(source: str, **shape: int) -> int:
    """Thread blocks that the GPU runs at once of the kernel of a source that exports `resident`."""
    return int(build(source, **shape).resident())


def stream_of(device: torch.device) -> int:
    """The stream that launches on a GPU go to at the moment, as Triton asks for it: without an object for it."""
    return int(torch._C._cuda_getCurrentRawStream(device.index))


def definitions(shape: Mapping[str, int]) -> list[str]:
    """The compiler's arguments for a shape."""
    return [f"-DMISA_{name.upper()}={int(value)}" for name, value in shape.items()]
