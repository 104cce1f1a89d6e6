"""A CPU platform for SGLang: a real, unmodified server of a DSA model on a machine without a GPU.

Scheduler, radix cache, paged allocator, `DSATokenToKVPool`, DSA metadata and `Indexer.forward_cuda` are SGLang's own;
only what needs Triton, sgl_kernel, DeepGEMM or tilelang has a torch twin. For demos and tests, not for speed.
"""

from __future__ import annotations

import os

ENV = "SGLANG_MISA_CPU"


def activate() -> str | None:
    """SGLang's entry point `sglang.srt.platforms: misa_cpu`: the platform class, or None to leave SGLang alone.

    Active only where the environment has SGLANG_MISA_CPU=1 (the launcher sets it) and torch sees no CUDA device.
    """
    if os.environ.get(ENV) != "1":
        return None
    import torch

    return None if torch.cuda.is_available() else "sglang_misa.cpu.platform.CpuPlatform"
