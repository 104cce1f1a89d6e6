"""SGLang's real DSA pool and paged allocator on the CPU, and an engine over such a pool's pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sglang_misa.config import MisaConfig
from sglang_misa.engines.reference import ReferenceEngine
from sglang_misa.kernels.layout import PAGE
from sglang_misa.runtime import Runtime


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


def reference_runtime(config: MisaConfig, topk: int = 64) -> Runtime:
    """A rank of its own on the CPU."""
    return Runtime(config, index_heads=32, topk=topk, context_len=1 << 20, device="cpu", rank=0, ranks=1)


def reference_engine(index_k_pages: Sequence[torch.Tensor]) -> ReferenceEngine:
    return ReferenceEngine(reference_runtime(MisaConfig()), index_k_pages)
