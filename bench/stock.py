"""Stock DSA's indexer, called as SGLang 0.5.17 calls it: the baseline of every kernel bench.

SGLang's kernels are imported where they are called, as they do not load without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sglang_misa.kernels.layout import PAGE


def fused_topk(ks: Tensor, ke: Tensor, slots: Tensor, topk: int) -> Callable[[Tensor], Tensor]:
    """SGLang's top-k of logits fp32 [T, L], within [ks, ke) of each row.

    ks and ke [T] int32, slots [1, L] int32: the page table of page size 1. The call returns physical slots [T, topk]
    int32 and reads no column outside.
    """
    from sgl_kernel import fast_topk_transform_fused

    cu_rows = torch.tensor([0, ks.shape[0]], dtype=torch.int32, device=ks.device)
    return lambda logits: fast_topk_transform_fused(logits, ke - ks, slots, cu_rows, topk, ks)


def prefill(
    index_q: Tensor,
    head_gates: Tensor,
    index_k: Tensor,
    k_scale: Tensor,
    ks: Tensor,
    ke: Tensor,
    select: Callable[[Tensor], Tensor],
) -> Callable[[], Tensor]:
    """One extend call of one request (Indexer._get_topk_ragged in PAGED mode): logits of all heads, then `select`.

    index_q [T, H, 128] fp8, head_gates [T, H], index_k [L, 128] fp8, k_scale [L], ks and ke [T] int32, select from
    `fused_topk`. The call returns physical slots [T, topk] int32.
    """
    import deep_gemm

    return lambda: select(deep_gemm.fp8_mqa_logits(index_q, (index_k, k_scale), head_gates, ks, ke, clean_logits=False))


def decode(
    index_q: Tensor, head_gates: Tensor, buffer: Tensor, page_table: Tensor, row_lens: Tensor, topk: int
) -> Callable[[], Tensor]:
    """One decode step (Indexer._get_topk_paged): paged logits of all heads, then top-k v2 to physical slots.

    index_q [R, H, 128] fp8, head_gates [R, H], buffer [num_pages, 8448] uint8, page_table [R, W] int32, row_lens [R]
    int32. The plans are made outside, as SGLang makes them once a step for all layers.
    """
    import deep_gemm
    from sglang.kernels.ops.attention.dsa.paged_mqa_logits import deepgemm_paged_mqa_logits_split
    from sglang.kernels.ops.attention.dsv4.topk import plan_topk_v2, topk_transform_512_v2

    lens_2d = row_lens.unsqueeze(-1)
    sms = torch.cuda.get_device_properties(index_q.device).multi_processor_count
    schedule = deep_gemm.get_paged_mqa_logits_metadata(lens_2d, PAGE, sms)
    plan = plan_topk_v2(row_lens)
    pages = buffer.view(buffer.shape[0], PAGE, 1, 132)
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
        topk_transform_512_v2(logits, row_lens, page_table, out, PAGE, plan)
        return out

    return call
