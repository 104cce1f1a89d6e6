"""SGLang's Indexer: where the selection of a layer is made. Wrappers, each called as wrapper(original, indexer, …)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.environ import envs
from sglang.srt.layers.attention.dsa import dsa_indexer
from sglang.srt.layers.attention.dsa.dsa_topk_backend import TopkTransformMethod
from torch import Tensor

from sglang_misa import audit, decode_gate, indexer, reference, runtime
from sglang_misa.config import SelectionPolicy
from sglang_misa.kernels.layout import PAGE
from sglang_misa.metrics import recorder
from sglang_misa.page_stats import PageStats
from sglang_misa.patches.forward_batch import longest


@functools.cache
def _auditor(stats: PageStats) -> audit.Auditor:
    """The auditor of one pool's layers: a draft model numbers its own from 0 again."""
    return audit.Auditor(runtime.current().config.audit)


@functools.cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def _bind(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = _signature(original).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def _pool(layer_id: int) -> tuple[Tensor, PageStats, int]:
    """The layer's index-K buffer, its pool's page means, and the pool-local layer; the getter is a transfer fence."""
    pool = dsa_indexer.get_token_to_kv_pool()
    return pool.get_index_k_with_scale_buffer(layer_id=layer_id), pool.misa_page_stats, layer_id - pool.start_layer


def get_topk_ragged(original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Indexer._get_topk_ragged: the rows of an extend call. Rows under the length gate go to stock DSA."""
    config = runtime.current().config
    call = _bind(original, args, kwargs)
    self, layer_id, metadata = call["self"], call["layer_id"], call["metadata"]
    page_table = metadata.get_page_table_64()
    if len(page_table) == 0:
        return original(*args, **kwargs)

    buffer, stats, layer = _pool(layer_id)
    spans = indexer.spans(metadata.get_dsa_extend_len_cpu(), metadata.get_indexer_seq_len_cpu().tolist())
    reason = _why_stock(config.prefill, _auditor(stats), layer_id, spans)
    if reason is not None:
        recorder.declined("prefill", reason)
        recorder.ran("prefill", "dsa")
        _update_written(call)
        return original(*args, **kwargs)
    extend = _Extend(self, layer_id, layer, call, stats)
    block_means = stats.heal(layer, buffer, page_table, extend.call.seq_lens, config.prefill.block_size)
    recorder.ran("prefill", config.prefill.name)
    return extend.select(config.prefill, spans, block_means)


def _why_stock(policy: SelectionPolicy, auditor: audit.Auditor, layer_id: int, spans: list[indexer.Span]) -> str | None:
    """The reason for which stock DSA takes a whole extend call, or None."""
    if not policy.active:
        return "policy-is-dsa"
    if layer_id in auditor.dense_layers:
        return "recall-floor"
    if all(span.length < policy.min_len for span in spans):
        return "under-min-len"
    return None


def _update_written(call: dict[str, Any]) -> None:
    """Means of the pages that an extend call completed and routed nothing on: only decode will read them."""
    if runtime.current().config.decode.active:
        buffer, stats, layer = _pool(call["layer_id"])
        stats.update_written(layer, buffer, call["forward_batch"].out_cache_loc[: call.get("num_tokens")].long())


class _Extend:
    """One extend call that selects by policy: gathers the keys as stock does, and finishes with stock's transform."""

    def __init__(self, self_: Any, layer_id: int, layer: int, call: dict[str, Any], stats: PageStats):
        self.indexer, self.metadata, self.stats = self_, call["metadata"], stats
        self.layer_id, self.layer = layer_id, layer
        self.ks, self.ke = self.metadata.get_indexer_kvcache_range()
        rows = self.ks.shape[0]
        page_table = self.metadata.get_page_table_64()
        lens_cpu = self.metadata.get_indexer_seq_len_cpu()
        k_fp8, k_scale = dsa_indexer.get_token_to_kv_pool().get_index_k_scale_buffer(
            layer_id, self.metadata.get_indexer_seq_len(), page_table, int(lens_cpu.sum()), int(lens_cpu.max())
        )
        q_fp8 = call["q_fp8"]
        given = call.get("topk_result")
        shape = (q_fp8.shape[0], self_.index_topk)
        self.result: Tensor = torch.full(shape, -1, dtype=torch.int32, device=q_fp8.device) if given is None else given
        self.call = indexer.RaggedCall(
            index_q=q_fp8[:rows],
            head_gates=call["weights"].squeeze(-1)[:rows],
            index_k=k_fp8.view(torch.float8_e4m3fn),
            k_scale=k_scale.view(torch.float32).squeeze(-1),
            row_lens=self.metadata.get_seqlens_expanded(),
            ks=self.ks,
            row_batch=self.metadata.get_token_to_batch_idx(),
            page_table=page_table,
            seq_lens=self.metadata.get_indexer_seq_len().int(),
        )

    def select(self, policy: SelectionPolicy, spans: list[indexer.Span], block_means: Tensor) -> Tensor:
        dense_from = 0
        # Requests share their launches, but for MISA†, whose marks would have a bit for the keys of every request.
        together = self.stats.kernels and policy.candidates is None
        for run in indexer.runs(spans, policy.min_len, together=together):
            self._dense(dense_from, run.first)
            dense_from = run.last
            if self.stats.kernels:
                indexer.ragged_topk(policy, self.call, run, block_means, self.space, self.result)
                continue
            for start, end, scores in indexer.ragged_scores(policy, self.call, run, self.stats, self.layer):
                self._finish(start, end, scores, self.ks.new_zeros(end - start))
        self._dense(dense_from, spans[-1].last_row)
        if _auditor(self.stats).due(self.layer_id):
            self._audit(policy, spans)
        return self.result

    def _dense(self, first: int, last: int) -> None:
        """Stock DSA for rows [first, last): DeepGEMM's all-head logits, in row chunks."""
        call = self.call
        for start, end in reference.row_chunks(last - first, call.index_k.shape[0]):
            rows = slice(first + start, first + end)
            q, gates, _ = self.indexer._pad_heads_for_deep_gemm(call.index_q[rows], call.head_gates[rows])
            with self.indexer._with_real_sm_count():
                logits = dsa_indexer.deep_gemm.fp8_mqa_logits(
                    q, (call.index_k, call.k_scale), gates, self.ks[rows], self.ke[rows], clean_logits=False
                )
            self._finish(rows.start, rows.stop, logits, self.ks[rows])

    def _finish(self, start: int, end: int, logits: Tensor, row_starts: Tensor) -> None:
        """Top-k of `logits` whose rows begin at column `row_starts`, as the attention backend expects it."""
        metadata, rows = self.metadata, slice(start, end)
        lengths = self.call.row_lens[rows]
        self.indexer._mask_init_and_local_tokens(logits, lengths, row_starts)
        offsets = metadata.attn_metadata.topk_indices_offset
        ragged = offsets is not None
        self.result[rows] = metadata.topk_transform(
            logits,
            self.indexer.index_topk,
            ks=row_starts,
            cu_seqlens_q=None if ragged else torch.ones_like(lengths),
            ke_offset=lengths,
            batch_idx_list=None if ragged else metadata.get_token_to_batch_idx()[rows],
            topk_indices_offset_override=offsets[rows] if ragged else None,
        )

    def _audit(self, policy: SelectionPolicy, spans: list[indexer.Span]) -> None:
        """Recall of sampled rows of this call against all heads over all tokens."""
        results = []
        for span in spans:
            rows = _auditor(self.stats).rows(span.gate(policy.min_len), span.last_row)
            if not rows:
                continue
            keys = self.call.keys(span)
            for row in rows:
                length = span.length - (span.last_row - 1 - row)
                dense = reference.index_scores(
                    self.call.index_q[row].unsqueeze(0).unsqueeze(0),
                    self.call.head_gates[row].unsqueeze(0).unsqueeze(0),
                    keys[:length].unsqueeze(0),
                ).flatten()
                chosen = torch.isin(self._output_ids(span, row, length), self.result[row])
                results.append(audit.overlap(dense, chosen, self.indexer.index_topk))
        _auditor(self.stats).record(self.layer_id, results)

    @functools.cached_property
    def space(self) -> indexer.OutputSpace:
        """The output space of metadata.topk_transform."""
        if not _fused(self.metadata):
            return indexer.OutputSpace()
        if self.metadata.topk_transform_method == TopkTransformMethod.RAGGED:
            return indexer.OutputSpace(offsets=self.metadata.attn_metadata.topk_indices_offset)
        return indexer.OutputSpace(pages=self.call.page_table)

    def _output_ids(self, span: indexer.Span, row: int, length: int) -> Tensor:
        """What the transform emits for each of the `length` positions that `row` sees."""
        position = torch.arange(length, device=self.result.device)
        if self.space.pages is not None:
            return self.space.pages[span.request, position // PAGE] * PAGE + position % PAGE
        return position if self.space.offsets is None else position + self.space.offsets[row]


def _fused(metadata: Any) -> bool:
    """Whether SGLang's transform maps positions to what the attention kernel reads, or leaves that to the backend."""
    return bool(envs.SGLANG_DSA_FUSE_TOPK.get()) and not metadata.force_unfused_topk


def get_topk_paged(original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Indexer._get_topk_paged: decode, target_verify and draft_extend rows, eager or captured. The gate chooses."""
    policy = runtime.current().config.decode
    call = _bind(original, args, kwargs)
    captured = "captured:" if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing() else ""
    if not policy.active:
        recorder.ran("decode", captured + "dsa")
        return original(*args, **kwargs)

    self, batch, metadata = call["self"], call["forward_batch"], call["metadata"]
    mode = batch.forward_mode
    expanded = mode.is_target_verify() or mode.is_draft_extend_v2()
    row_lens = metadata.get_seqlens_expanded() if expanded else metadata.get_seqlens_int32()
    page_table = metadata.get_page_table_64()
    buffer, stats, layer = _pool(call["layer_id"])
    if not stats.kernels:  # the reference routes on the page that this step completed
        stats.update_newest(layer, buffer, page_table, row_lens)
    if decode_gate.is_stock(policy, longest(batch)):
        recorder.ran("decode", captured + "dsa")
        if not captured:
            recorder.declined("decode", "under-min-len")
        result = original(*args, **kwargs)
    else:
        recorder.ran("decode", captured + policy.name)
        result = _select_paged(policy, call, buffer, page_table, row_lens, stats, layer)
    if stats.kernels:
        stats.end_layer(page_table, row_lens, last=self.misa_last)
    return result


def _select_paged(
    policy: SelectionPolicy,
    call: dict[str, Any],
    buffer: Tensor,
    page_table: Tensor,
    row_lens: Tensor,
    stats: PageStats,
    layer: int,
) -> Tensor:
    """The policy's selection for the rows of a decode call, padded to the rows of its queries."""
    self, metadata, q_fp8 = call["self"], call["metadata"], call["q_fp8"]
    rows = sum(metadata.get_dsa_extend_len_cpu())
    inputs = (q_fp8[:rows], call["weights"].squeeze(-1)[:rows], buffer, page_table, row_lens, stats, layer)
    if stats.kernels:
        result = indexer.paged_topk(policy, *inputs, self.index_topk, positions=not _fused(metadata))
    else:
        scores = indexer.paged_scores(policy, *inputs)
        self._mask_init_and_local_tokens(scores, row_lens)
        result = metadata.topk_transform(scores, self.index_topk)
    padded = q_fp8.shape[0] - rows
    return torch.nn.functional.pad(result, (0, 0, 0, padded), value=-1) if padded else result


def forward_k_only(original: Callable[..., Tensor | None], *args: Any, **kwargs: Any) -> Tensor | None:
    """Indexer._forward_cuda_k_only: short prefills write index-K and select nothing; decode needs their page means."""
    call = _bind(original, args, kwargs)
    result = original(*args, **kwargs)
    _update_written(call)
    recorder.ran("prefill", "dsa")
    recorder.declined("prefill", "all-tokens-visible")
    return result
