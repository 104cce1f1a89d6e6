"""Stock DSA's own indexer, as SGLang calls it: the baseline of every time that is reported.

SGLang's kernels are imported where they are called, as they do not load without a GPU. 0.5.17 and 0.5.23 are known;
from 0.5.19 on SGLang has an exact prefill top-k (`topk_transform_ragged_v2`), which is the baseline where it exists.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable

import torch
from torch import Tensor

from sglang_misa.kernels.layout import HEAD_DIM, PAGE


def version() -> str:
    """The version of SGLang; empty where there is none."""
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _prefill_topk(ks: Tensor, ke: Tensor, topk: int) -> Callable[[Tensor], Tensor]:
    """The top k of logits fp32 [T, S] within [ks, ke) of each row: ids int32 [T, topk]."""
    from sglang.kernels.ops.attention.dsv4 import topk as kernels

    lens = ke - ks
    if hasattr(kernels, "topk_transform_ragged_v2"):

        def ragged(logits: Tensor) -> Tensor:
            out = torch.empty(len(lens), topk, dtype=torch.int32, device=lens.device)
            kernels.topk_transform_ragged_v2(logits, lens, out_offsets=ks, out_indices=out, row_starts=ks)
            return out

        return ragged
    from sgl_kernel import fast_topk_transform_ragged_fused

    return lambda logits: fast_topk_transform_ragged_fused(logits, lens, ks, topk, ks)


def prefill(
    index_q: Tensor, head_gates: Tensor, index_k: Tensor, k_scale: Tensor, ks: Tensor, ke: Tensor, topk: int
) -> Callable[[], Tensor]:
    """One extend call (Indexer._get_topk_ragged): logits of all heads, then the top k of each row's window.

    index_q [T, H, 128] fp8, head_gates [T, H], index_k [S, 128] fp8, k_scale [S], ks and ke [T] int32. The call returns
    places among the S keys, int32 [T, topk], -1 behind the last.
    """
    import deep_gemm

    select = _prefill_topk(ks, ke, topk)
    return lambda: select(deep_gemm.fp8_mqa_logits(index_q, (index_k, k_scale), head_gates, ks, ke, clean_logits=False))


def decode(
    index_q: Tensor, head_gates: Tensor, index_k_pages: Tensor, page_table: Tensor, seq_lens: Tensor, topk: int
) -> Callable[[], Tensor]:
    """One decode step (Indexer._get_topk_paged): paged logits of all heads, then top-k v2 to physical slots.

    index_q [R, H, 128] fp8, head_gates [R, H], index_k_pages [num_pages, 8448] uint8, page_table [R, W] int32, seq_lens
    [R] int32. The plans are made outside, as SGLang makes them once a step for all layers.
    """
    import deep_gemm
    from sglang.kernels.ops.attention.dsa.paged_mqa_logits import deepgemm_paged_mqa_logits_split
    from sglang.kernels.ops.attention.dsv4 import topk as kernels

    # The one from 0.5.20 on; before it had another name.
    transform = getattr(kernels, "topk_transform_paged_v2", None) or kernels.topk_transform_512_v2
    lens_2d = seq_lens.unsqueeze(-1)
    sms = torch.cuda.get_device_properties(index_q.device).multi_processor_count
    schedule = deep_gemm.get_paged_mqa_logits_metadata(lens_2d, PAGE, sms)
    plan = kernels.plan_topk_v2(seq_lens)
    pages = index_k_pages.view(-1, PAGE, 1, HEAD_DIM + 4)
    out = torch.empty(index_q.shape[0], topk, dtype=torch.int32, device=index_q.device)

    def call() -> Tensor:
        logits = deepgemm_paged_mqa_logits_split(
            deep_gemm.fp8_paged_mqa_logits,
            index_q,
            pages,
            head_gates,
            lens_2d,
            page_table,
            schedule,
            page_table.shape[1] * PAGE,
            q_offset=index_q.shape[0],
        )
        transform(logits, seq_lens, page_table, out, PAGE, plan)
        return out

    return call
