"""SGLang's Indexer: hands its calls to the pool's selector. Wrappers, each called as wrapper(original, self, …)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.attention.dsa import dsa_indexer
from torch import Tensor

from sglang_misa import decode_gate
from sglang_misa.call import Span, spans
from sglang_misa.metrics import recorder
from sglang_misa.patches.forward_batch import prompt_lens, step
from sglang_misa.patches.indexer_calls import decode_call, decode_rows, extend_call


def get_topk_ragged(
    original: Callable[..., Tensor],
    self: Any,
    enable_dual_stream: bool,
    forward_batch: Any,
    layer_id: int,
    q_fp8: Tensor,
    weights: Tensor,
    metadata: Any,
    topk_result: Tensor | None = None,
) -> Tensor:
    """Indexer._get_topk_ragged: the rows of an extend call, by the prefill policy past its length gate."""
    stock = (self, enable_dual_stream, forward_batch, layer_id, q_fp8, weights, metadata, topk_result)
    if len(metadata.get_page_table_64()) == 0:
        return original(*stock)
    pool = dsa_indexer.get_token_to_kv_pool()
    selector, layer = pool.misa_selector, layer_id - pool.start_layer
    requests = _requests(metadata)
    call = functools.partial(extend_call, pool, layer_id, requests, q_fp8, weights, metadata)
    reason = selector.why_stock(layer, requests)
    if reason is not None:
        recorder.declined("prefill", reason)
        recorder.ran("prefill", "dsa")
        _extended(pool, layer, requests, metadata)
        ids = original(*stock)
        selector.left_to_stock(layer, requests, functools.partial(call, ids))
        return ids
    recorder.ran("prefill", selector.policy("prefill", layer).name)
    ids = _room_for_ids(self, q_fp8, behind=requests[-1].last_row) if topk_result is None else topk_result
    selector.extend(call(ids))
    return ids


def get_topk_paged(
    original: Callable[..., Tensor],
    self: Any,
    forward_batch: Any,
    layer_id: int,
    q_fp8: Tensor,
    weights: Tensor,
    metadata: Any,
) -> Tensor:
    """Indexer._get_topk_paged: decode, target_verify and draft_extend rows, eager or captured. The gate chooses."""
    pool = dsa_indexer.get_token_to_kv_pool()
    selector, layer, mode = pool.misa_selector, layer_id - pool.start_layer, forward_batch.forward_mode
    expanded = mode.is_target_verify() or mode.is_draft_extend_v2()
    seq_lens = metadata.get_seqlens_expanded() if expanded else metadata.get_seqlens_int32()
    call = functools.partial(decode_call, pool, layer_id, seq_lens, q_fp8, weights, metadata)
    policy = selector.policy("decode", layer)
    reason = selector.why_stock_decodes(layer, len(q_fp8), step(forward_batch))
    if reason is not None:
        _count_decode("dsa", reason if policy.active else None, on_gpu=q_fp8.is_cuda)
        ids = original(self, forward_batch, layer_id, q_fp8, weights, metadata)
        if policy.active:
            selector.decode_left_to_stock(functools.partial(call, ids))
    else:
        _count_decode(policy.name, None, on_gpu=q_fp8.is_cuda)
        ids = _room_for_ids(self, q_fp8, behind=decode_rows(metadata))
        selector.decode(call(ids))
    if selector.ladders.decodes and self.misa_last:
        selector.engine.end_step(metadata.get_page_table_64(), seq_lens)
    return ids


def _count_decode(path: str, declined: str | None, *, on_gpu: bool) -> None:
    """Count a call and why it was declined; of a graph its capture alone, as no request is in that and its warm-ups."""
    if on_gpu and torch.cuda.is_current_stream_capturing():
        recorder.ran("decode", f"captured:{path}")
    elif decode_gate.capture() is None:
        recorder.ran("decode", path)
        if declined is not None:
            recorder.declined("decode", declined)


def forward_k_only(
    original: Callable[..., Tensor | None],
    self: Any,
    x: Any,
    positions: Tensor,
    forward_batch: Any,
    layer_id: int,
    act_quant: Any,
    metadata: Any,
    return_indices: bool = True,
    *,
    num_tokens: int | None = None,
    topk_result: Tensor | None = None,
) -> Tensor | None:
    """Indexer._forward_cuda_k_only: short prefills write index-K and select nothing; decode needs their statistics."""
    stock = (self, x, positions, forward_batch, layer_id, act_quant, metadata, return_indices)
    result = original(*stock, num_tokens=num_tokens, topk_result=topk_result)
    pool = dsa_indexer.get_token_to_kv_pool()
    _extended(pool, layer_id - pool.start_layer, _requests(metadata), metadata)
    recorder.ran("prefill", "dsa")
    recorder.declined("prefill", "all-tokens-visible")
    return result


def _requests(metadata: Any) -> tuple[Span, ...]:
    """The spans of an extend call."""
    return spans(metadata.get_dsa_extend_len_cpu(), metadata.get_indexer_seq_len_cpu().tolist(), prompt_lens())


def _extended(pool: Any, layer: int, requests: tuple[Span, ...], metadata: Any) -> None:
    """Statistics of the pages that an extend call completed and selected nothing on: only decode will read them."""
    if requests and pool.misa_selector.ladders.decodes:
        lens = metadata.get_indexer_seq_len().int()
        pool.misa_selector.engine.extended(layer, requests, metadata.get_page_table_64(), lens)


def _room_for_ids(indexer: Any, q_fp8: Tensor, behind: int) -> Tensor:
    """Room for the ids of every row: -1 in rows of padding, `behind` those whose ids a call writes, all of them."""
    ids = torch.empty(q_fp8.shape[0], indexer.index_topk, dtype=torch.int32, device=q_fp8.device)
    ids[behind:].fill_(-1)
    return ids
