"""Torch twins of the copies between KV pools and SGLang's host cache, by its `direct` and `kernel` backends."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
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


def transfer_kv_per_layer_mla(
    src: Tensor, dst: Tensor, src_indices: Tensor, dst_indices: Tensor, item_size: int
) -> None:
    """Copy rows `src_indices` of a layer to rows `dst_indices`."""
    dst[dst_indices] = src[src_indices]


def transfer_kv_per_layer_mla_pf_lf(
    src: Tensor,
    dst: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    layer_id: int,
    item_size: int,
    src_layout_dim: int,
) -> None:
    """Copy a layer's part of host rows [rows, layers, …] to rows of the layer's pool."""
    dst[dst_indices] = src[src_indices, layer_id].reshape(len(dst_indices), *dst.shape[1:])


def transfer_kv_all_layer_mla(
    src_layers: Tensor,
    dst_layers: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    item_size: int,
    num_layers: int,
) -> None:
    """Copy rows of `item_size` bytes of every layer; `src_layers` and `dst_layers` are addresses."""
    for source, target in zip(src_layers.tolist(), dst_layers.tolist(), strict=True):
        _rows(target, dst_indices, item_size)[dst_indices] = _rows(source, src_indices, item_size)[src_indices]


def transfer_kv_all_layer_mla_lf_pf(
    src_layers: Tensor,
    dst: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    item_size: int,
    dst_layout_dim: int,
    num_layers: int,
) -> None:
    """Copy rows of every layer's pool, at the addresses `src_layers`, to host rows [rows, layers, …]."""
    target = dst.view(torch.uint8).view(len(dst), num_layers, item_size)
    for layer, source in enumerate(src_layers.tolist()):
        target[dst_indices, layer] = _rows(source, src_indices, item_size)[src_indices]


def _rows(address: int, indices: Tensor, item_size: int) -> Tensor:
    """Memory from `address` on, as uint8 [rows, item_size] up to the last of `indices`."""
    size = (int(indices.max()) + 1) * item_size
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8).view(-1, item_size)


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
    twins = (
        transfer_kv_direct,
        transfer_kv_per_layer_direct_pf_lf,
        transfer_kv_all_layer_direct_lf_pf,
        transfer_kv_per_layer_mla,
        transfer_kv_per_layer_mla_pf_lf,
        transfer_kv_all_layer_mla,
        transfer_kv_all_layer_mla_lf_pf,
    )
    for name in filter(importlib.util.find_spec, _MODULES):
        module: Any = importlib.import_module(name)
        for twin in twins:
            setattr(module, twin.__name__, twin)
