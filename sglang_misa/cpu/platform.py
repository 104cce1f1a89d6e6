"""The platform class that SGLang asks for devices, pools, defaults and one-time start-up."""

from __future__ import annotations

import os
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

MAX_TOTAL_TOKENS = 32768  # SGLang would otherwise fill most of the machine's memory with KV cache
MAX_RUNNING_REQUESTS = 16  # each reserves a table as wide as the context

# What SGLang reads from the environment, in every process: top-k in its own step (the fused one is a CUDA kernel), and
# the rotary cache in fp32 as on a GPU.
ENVIRONMENT = {"SGLANG_DSA_FUSE_TOPK": "0", "SGLANG_ROPE_CACHE_FP32": "1"}

# What bounds a worker's memory, unless the user chose otherwise: PyTorch (ideep) and oneDNN each keep the last 1024
# products of bf16 matrices by their shapes, half a megabyte apiece, and every length of a prompt is a shape.
BOUNDS = {"LRU_CACHE_CAPACITY": "64", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}


class CpuPlatform(CpuDeviceMixin, SRTPlatform):  # type: ignore[misc]
    """SGLang on plain CPU tensors, out of tree: SGLang's in-tree CPU engine needs a CPU build of sgl_kernel."""

    _enum = PlatformEnum.OOT

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Set what works here, where the user chose nothing; runs in the main process before SGLang's own defaults."""
        from sglang_misa.cpu import hooks

        os.environ.update(ENVIRONMENT)
        for name, value in BOUNDS.items():
            os.environ.setdefault(name, value)
        hooks.install_for_arguments()
        if server_args.attention_backend in ("intel_amx", "torch_native"):
            server_args.attention_backend = None  # SGLang's CPU default; None lets a DSA model choose "dsa"
        # With overlap a "device to host copy" is a view of a buffer that the next step overwrites.
        server_args.disable_overlap_schedule = True
        server_args.max_total_tokens = server_args.max_total_tokens or MAX_TOTAL_TOKENS
        server_args.max_running_requests = server_args.max_running_requests or MAX_RUNNING_REQUESTS
        server_args.dsa_prefill_backend = server_args.dsa_prefill_backend or "tilelang"
        server_args.dsa_decode_backend = server_args.dsa_decode_backend or "tilelang"
        server_args.dsa_topk_backend = "torch"

    def init_backend(self) -> None:
        """Install every torch twin; SGLang calls this in each worker while it imports the model runner."""
        from sglang_misa.cpu import hooks

        os.environ.update(ENVIRONMENT)
        torch._dynamo.config.disable = True  # Inductor would need a C++ compiler
        hooks.install_for_models()

    def get_device(self, device_id: int | None = None) -> str:
        return "cpu"  # SGLang splits this as a string

    def get_dispatch_key_name(self) -> str:
        return "cpu"

    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        return torch.profiler.ProfilerActivity.CPU

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_paged_allocator_cls(self) -> type:
        from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator

        return PagedTokenToKVPoolAllocator  # type: ignore[no-any-return]

    def get_dsa_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool

        return DSATokenToKVPool  # type: ignore[no-any-return]

    def get_mla_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

        return MLATokenToKVPool  # type: ignore[no-any-return]

    def get_mha_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool  # type: ignore[no-any-return]
