"""A rank of its own on the CPU, and an engine over a pool's pages."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_misa.config import MisaConfig
from sglang_misa.engines.reference import ReferenceEngine
from sglang_misa.runtime import Runtime


def reference_runtime(config: MisaConfig, topk: int = 64) -> Runtime:
    """A rank of its own on the CPU."""
    return Runtime(config, index_heads=32, topk=topk, row_len=1 << 20, device="cpu", rank=0, ranks=1)


def reference_engine(index_k_pages: Sequence[torch.Tensor]) -> ReferenceEngine:
    return ReferenceEngine(reference_runtime(MisaConfig()), index_k_pages)
