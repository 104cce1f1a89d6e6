"""SGLang's real DSA pool and paged allocator on the CPU."""

from __future__ import annotations

from typing import Any

import torch

from sglang_misa.kernels.layout import PAGE


def make_pool(pages: int, layers: int = 1) -> tuple[Any, Any]:
    """A DSATokenToKVPool of `pages` pages and the allocator over it."""
    from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
    from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool
    from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

    set_global_server_args_for_scheduler(ServerArgs(model_path="dummy", device="cpu"))
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
