"""Torch twins of the copies between KV pools and SGLang's host cache, by its `direct` backend."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

from torch import Tensor

_MODULES = tuple(f"sglang.srt.mem_cache.{name}" for name in ("memory_pool_host", "pool_host.mla", "pool_host.dsa"))


def transfer_kv_direct(
    src_layers: Sequence[Tensor], dst_layers: Sequence[Tensor], src_indices: Tensor, dst_indices: Tensor, page_size: int
) -> None:
    """Copy rows `src_indices` of each layer to rows `dst_indices`. Mirrors sgl_kernel.kvcacheio, as do the others."""
    for source, target in zip(src_layers, dst_layers, strict=True):
        target[dst_indices] = source[src_indices]


def transfer_kv_per_layer_direct_pf_lf(
    src_ptrs: Sequence[Tensor],
    dst_ptrs: Sequence[Tensor],
    src_indices: Tensor,
    dst_indices: Tensor,
    layer_id: int,
    page_size: int,
) -> None:
    """Copy a layer's part of host pages [pages, layers, …] to rows of the layer's pool; indices count rows of it."""
    pages = src_indices[::page_size] // page_size
    for source, target in zip(src_ptrs, dst_ptrs, strict=True):
        target[dst_indices] = source[pages, layer_id].reshape(len(dst_indices), *target.shape[1:])


def transfer_kv_all_layer_direct_lf_pf(
    src_ptrs: Sequence[Tensor], dst_ptrs: Sequence[Tensor], src_indices: Tensor, dst_indices: Tensor, page_size: int
) -> None:
    """Copy rows of every layer's pool to host pages [pages, layers, …]; indices count rows of a pool."""
    pages = dst_indices[::page_size] // page_size
    (target,) = dst_ptrs
    for layer, source in enumerate(src_ptrs):
        target[pages, layer] = source[src_indices].reshape(len(pages), *target.shape[2:])


def allocate(dims: tuple[int, ...], dtype: Any, device: str, pin_memory: bool, allocator: Any, **_: Any) -> Tensor:
    """A host buffer that no GPU needs to reach. Mirrors alloc_with_host_register."""
    buffer: Tensor = allocator.allocate(dims, dtype=dtype, device=device)
    return buffer


def install() -> None:
    """Give SGLang's host pools what they import where there is a GPU, and plain memory."""
    from sglang.srt.mem_cache.pool_host import common
    from sglang.srt.mem_cache.pool_host.base import HostKVCache

    common.ALLOC_MEMORY_FUNCS["cpu"] = allocate
    HostKVCache.pin_memory = property(lambda _: False, lambda *_: None)  # CUDA's pinned memory, which pools ask for
    for name in filter(importlib.util.find_spec, _MODULES):
        module: Any = importlib.import_module(name)
        module.transfer_kv_direct = transfer_kv_direct
        module.transfer_kv_per_layer_direct_pf_lf = transfer_kv_per_layer_direct_pf_lf
        module.transfer_kv_all_layer_direct_lf_pf = transfer_kv_all_layer_direct_lf_pf
