"""SGLang's DSA pool with a host cache beside it: its own pools, allocator and cache controller, without a server."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from sglang_misa.cpu import host_cache
from sglang_misa.kernels.layout import PAGE


def _server_args(device: str, **arguments: Any) -> Any:
    from sglang.srt.server_args import ServerArgs

    return ServerArgs(model_path="dummy", device=device, **arguments)


def make_pool(pages: int, layers: int = 1, device: str = "cpu", **arguments: Any) -> tuple[Any, Any]:
    """A DSATokenToKVPool of `pages` pages and the allocator over it, under server `arguments`."""
    from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
    from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool
    from sglang.srt.server_args import set_global_server_args_for_scheduler

    set_global_server_args_for_scheduler(_server_args(device, **arguments))
    pool = DSATokenToKVPool(
        size=pages * PAGE,
        page_size=PAGE,
        kv_lora_rank=512,
        dtype=torch.bfloat16,
        qk_rope_head_dim=64,
        layer_num=layers,
        device=device,
        index_head_dim=128,
        enable_memory_saver=False,
        kv_cache_dim=576,
    )
    allocator = PagedTokenToKVPoolAllocator(
        pages * PAGE, page_size=PAGE, dtype=torch.bfloat16, device=device, kvcache=pool, need_sort=False
    )
    return pool, allocator


class HostCache:
    """A DSA pool, its host pools, and SGLang's controller of the copies between them."""

    def __init__(self, pages: int, layers: int, device: str = "cpu", **arguments: Any):
        """As `make_pool`, with hicache_* among the server `arguments`."""
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.hybrid_cache import hybrid_pool_assembler
        from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

        if device == "cpu":
            host_cache.install()
        self.pool, self.allocator = make_pool(pages, layers, device, **arguments)
        params = CacheInitParams(
            disable=False, req_to_token_pool=None, token_to_kv_pool_allocator=self.allocator, page_size=PAGE
        )
        stack = hybrid_pool_assembler._select_strategy(self.pool, {ComponentType.FULL}).build(
            cache=None,
            kvcache=self.pool,
            params=params,
            server_args=_server_args(device, **arguments),
            load_cache_event=threading.Event(),
        )
        self.pools, self.controller, self._sidecars = stack.host_pool_group, stack.cache_controller, stack.sidecars

    def _index_keys(self) -> list[Any]:
        """Index-K goes where the latent cache goes."""
        from sglang.srt.mem_cache.hicache_storage import PoolTransfer

        return [PoolTransfer(name=each.pool_name, indices_from_pool=each.indices_from_pool) for each in self._sidecars]

    def offload(self, slots: Tensor) -> Tensor | None:
        """Begin to copy whole pages of token `slots` to the host: their slots there, or None without room."""
        host_slots: Tensor | None = self.controller.write(slots, extra_pools=self._index_keys())
        return host_slots

    def load_back(self, host_slots: Tensor) -> Tensor | None:
        """Begin to copy pages back: the slots that the allocator gave them, or None without room."""
        slots: Tensor | None = self.controller.load(host_slots, extra_pools=self._index_keys())
        self.controller.start_loading()
        return slots
