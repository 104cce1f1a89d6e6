"""The host's side of the CUDA kernels: building at first use, checks of tensors, and where a top k is written."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sglang_misa.kernels.checks import expect
from sglang_misa.kernels.structs import Output


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


def definitions(shape: Mapping[str, int]) -> list[str]:
    """The compiler's arguments for a shape."""
    return [f"-DMISA_{name.upper()}={int(value)}" for name, value in shape.items()]


@dataclass(frozen=True)
class Target:
    """Where the chosen keys go and what is written for them."""

    out: torch.Tensor  # [T, k] int32
    page_table: torch.Tensor | None = None  # [B, W] int32: physical pages of 64 slots; rows may lie apart
    row_batch: torch.Tensor | None = None  # [T] int32: the row's request
    offsets: torch.Tensor | None = None  # [T] int32: added to positions

    def check(self, rows: int, k: int) -> None:
        expect("out", self.out, (rows, k), torch.int32, cuda=True)
        if (self.page_table is None) != (self.row_batch is None):
            raise ValueError(
                "page_table and row_batch: expected both or neither; pass the request of each row beside its table"
            )
        if self.page_table is not None and self.offsets is not None:
            raise ValueError("page_table and offsets: expected at most one, got both; choose PAGED or RAGGED output")
        if self.page_table is not None and self.row_batch is not None:
            expect("page_table", self.page_table, (None, None), torch.int32, row_stride=True, cuda=True)
            expect("row_batch", self.row_batch, (rows,), torch.int32, cuda=True)
        if self.offsets is not None:
            expect("offsets", self.offsets, (rows,), torch.int32, cuda=True)

    def struct(self) -> Output:
        return Output(
            out=self.out,
            k=self.out.shape[1],
            page_table=self.page_table,
            row_batch=self.row_batch,
            page_pitch=0 if self.page_table is None else self.page_table.stride(0),
            offsets=self.offsets,
        )
