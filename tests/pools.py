"""SGLang's real DSA pool and paged allocator on the CPU, and an engine over such a pool's pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sglang_misa.config import MisaConfig
from sglang_misa.engines.reference import ReferenceEngine
from sglang_misa.kernels.layout import PAGE
from sglang_misa.runtime import Runtime


def make_pool(pages: int, layers: int = 1, **arguments: Any) -> tuple[Any, Any]:
    """A DSATokenToKVPool of `pages` pages and the allocator over it, under server `arguments`."""
    from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
    from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool
    from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

    set_global_server_args_for_scheduler(ServerArgs(model_path="dummy", device="cpu", **arguments))
    pool = DSATokenToKVPool(
        size=pages * PAGE,
        page_size=PAGE,
        kv_lora_rank=512,
        dtype=torch.bfloat16,
        qk_rope_head_dim=64,
        layer_num=layers,
        device="cpu",
        index_head_dim=128,
        enable_memory_saver=False,
        kv_cache_dim=576,
    )
    allocator = PagedTokenToKVPoolAllocator(
        pages * PAGE, page_size=PAGE, dtype=torch.bfloat16, device="cpu", kvcache=pool, need_sort=False
    )
    return pool, allocator


def reference_runtime(config: MisaConfig, topk: int = 64) -> Runtime:
    """A rank of its own on the CPU."""
    return Runtime(config, index_heads=32, topk=topk, row_len=1 << 20, device="cpu", rank=0, ranks=1)


def reference_engine(index_k_pages: Sequence[torch.Tensor]) -> ReferenceEngine:
    return ReferenceEngine(reference_runtime(MisaConfig()), index_k_pages)


class HostCache:
    """SGLang's host pools of a DSA pool, and its own engine of the copies between them, on plain memory."""

    def __init__(self, pool: Any):
        """`pool` of `make_pool` with hicache_* arguments."""
        from sglang.srt.mem_cache.hybrid_cache.host_pool_config import prepare_host_pool_config
        from sglang.srt.mem_cache.hybrid_cache.hybrid_pool_assembler import build_host_pool_group
        from sglang.srt.mem_cache.l2_transfer import L2TransferEngine

        from sglang_misa.cpu import host_cache

        host_cache.install()
        layers = pool.layer_num
        config = prepare_host_pool_config(
            decls=pool.host_pool_decls(),
            full_layer_mapping={layer: layer for layer in range(layers)},
            transfer_layer_id_max=layers,
            transfer_page_size=PAGE,
            packed_draft_device_pools=(),
        )
        self.group, self.engine, self.layers = build_host_pool_group(config=config), L2TransferEngine("direct"), layers

    def _transfers(self, host_slots: torch.Tensor, slots: torch.Tensor) -> list[Any]:
        from sglang.srt.mem_cache.l2_transfer import L2Transfer

        return [L2Transfer(each.host_pool, each.device_pool, host_slots, slots) for each in self.group.entries]

    def offload(self, slots: torch.Tensor) -> torch.Tensor | None:
        """Copy whole pages of token `slots` to the host: their slots there, or None without room."""
        host_slots: torch.Tensor | None = self.group.entries[0].host_pool.alloc(len(slots))
        if host_slots is not None:
            self.engine.submit_device_to_host(self._transfers(host_slots, slots))
        return host_slots

    def load_back(self, host_slots: torch.Tensor, slots: torch.Tensor) -> None:
        """Copy pages back to `slots` of the pool, and free them on the host."""
        self.engine.submit_host_to_device(self._transfers(host_slots, slots), transfer_layer_id_max=self.layers)
        self.group.entries[0].host_pool.free(host_slots)
