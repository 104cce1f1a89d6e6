"""What SGLang's indexer hands over, in this package's terms: one extend or decode call of a layer."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.environ import envs
from sglang.srt.layers.attention.dsa.dsa_topk_backend import TopkTransformMethod
from torch import Tensor

from sglang_misa.call import DecodeCall, ExtendCall, Output, Span


def extend_call(
    pool: Any, layer_id: int, spans: tuple[Span, ...], q_fp8: Tensor, weights: Tensor, metadata: Any, ids: Tensor
) -> ExtendCall:
    """The rows of an extend call, their keys gathered from the pool as stock does; `ids` int32 [>= T, k] to write."""
    ks, _ = metadata.get_indexer_kvcache_range()
    rows, last = ks.shape[0], spans[-1]
    page_table, row_batch = metadata.get_page_table_64(), metadata.get_token_to_batch_idx()
    request_lens = metadata.get_indexer_seq_len()
    index_k, k_scale = pool.get_index_k_scale_buffer(
        layer_id, request_lens, page_table, last.first_key + last.length, max(span.length for span in spans)
    )
    return ExtendCall(
        layer=layer_id - pool.start_layer,
        spans=spans,
        index_q=q_fp8[:rows],
        head_gates=weights.squeeze(-1)[:rows],
        index_k=index_k.view(torch.float8_e4m3fn),
        k_scale=k_scale.view(torch.float32).squeeze(-1),
        seq_lens=metadata.get_seqlens_expanded(),
        ks=ks,
        row_batch=row_batch,
        page_table=page_table,
        request_lens=request_lens.int(),
        output=_output(metadata, ids[:rows], page_table, row_batch),
    )


def decode_call(
    pool: Any, layer_id: int, seq_lens: Tensor, q_fp8: Tensor, weights: Tensor, metadata: Any, ids: Tensor
) -> DecodeCall:
    """The rows of a decode, verify or draft call. The pool's getter is the fence of a host cache's transfers."""
    rows = decode_rows(metadata)
    return DecodeCall(
        layer=layer_id - pool.start_layer,
        index_q=q_fp8[:rows],
        head_gates=weights.squeeze(-1)[:rows],
        index_k_pages=pool.get_index_k_with_scale_buffer(layer_id=layer_id),
        page_table=metadata.get_page_table_64(),
        seq_lens=seq_lens,
        ids=ids[:rows],
        positions=not _fused(metadata),
    )


def decode_rows(metadata: Any) -> int:
    """Rows of a decode, verify or draft call, without those of padding behind them."""
    return sum(metadata.get_dsa_extend_len_cpu())


def _fused(metadata: Any) -> bool:
    """Whether SGLang's transform maps positions to what the attention kernel reads, or leaves that to the backend."""
    return bool(envs.SGLANG_DSA_FUSE_TOPK.get()) and not metadata.force_unfused_topk


def _output(metadata: Any, ids: Tensor, page_table: Tensor, row_batch: Tensor) -> Output:
    """What metadata.topk_transform would write for the rows of an extend call."""
    if not _fused(metadata):
        return Output(ids)
    if metadata.topk_transform_method == TopkTransformMethod.RAGGED:
        return Output(ids, offsets=metadata.attn_metadata.topk_indices_offset[: len(ids)])
    return Output(ids, page_table, row_batch)
