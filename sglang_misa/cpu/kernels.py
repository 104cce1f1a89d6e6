"""Torch twins of the kernels that SGLang launches on a GPU on the way of a DSA model, with SGLang's arguments."""

from __future__ import annotations

import functools
from typing import Any

import torch

FP8_MAX = 448.0
AMAX_FLOOR = 1e-4  # SGLang's guard against a row of zeros
SCRATCH = 1 << 25  # elements of gathered latent KV held at once


class OnIndexedDevice(torch.Tensor):  # type: ignore[misc]
    """A CPU tensor that names its device with an index, as a CUDA tensor does: `Indexer._get_topk_ragged` asks for one.

    Every operation on it returns a plain tensor.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:
        return torch.device("cpu", 0)


def act_quant(
    x: torch.Tensor, block_size: int = 128, scale_fmt: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(fp8 values like x, fp32 scales [..., N / block_size]); a scale_fmt rounds scales up to powers of two (ue8m0).

    Mirrors act_quant of sglang.kernels.ops.
    """
    groups = x.float().unflatten(-1, (-1, block_size))
    scale = groups.abs().amax(-1).clamp_min(AMAX_FLOOR) / FP8_MAX
    if scale_fmt is not None:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    values = (groups / scale[..., None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return values.flatten(-2).as_subclass(OnIndexedDevice), scale


def set_index_keys(
    self: Any, layer_id: int, loc: torch.Tensor, index_k: torch.Tensor, index_k_scale: torch.Tensor
) -> None:
    """Write keys [T, D] fp8 and scales [T] or [T, 1] fp32 at token slots loc [T] of a layer's index-K pages.

    Mirrors DSATokenToKVPool.set_index_k_scale_buffer.
    """
    keys, scales = _parts(self, layer_id)
    page, offset = loc // self.page_size, loc % self.page_size
    keys[page, offset] = index_k.view(torch.uint8)
    scales[page, offset] = index_k_scale.reshape(-1, 1).view(torch.uint8)


def get_index_keys(
    self: Any,
    layer_id: int,
    seq_len_tensor: torch.Tensor,
    page_indices: torch.Tensor,
    seq_len_sum: int,
    max_seq_len: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(keys [Σ len, D] uint8, scales [Σ len, 4] uint8) of all requests, one after another, by page tables [B, W].

    Mirrors DSATokenToKVPool.get_index_k_scale_buffer.
    """
    keys, scales = _parts(self, layer_id)
    b_i, position = (torch.arange(max_seq_len) < seq_len_tensor[:, None]).nonzero(as_tuple=True)
    page, offset = page_indices[b_i, position // self.page_size].long(), position % self.page_size
    return keys[page, offset], scales[page, offset]


def _parts(pool: Any, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of a layer's index-K pages: keys [P, page, D] and scales [P, page, 4], uint8 both."""
    pages = pool.get_index_k_with_scale_buffer(layer_id)
    keys = pool.page_size * pool.index_head_dim
    return pages[:, :keys].unflatten(1, (pool.page_size, -1)), pages[:, keys:].unflatten(1, (pool.page_size, -1))


def store_latent_kv(
    kv_buffer: torch.Tensor, loc: torch.Tensor, cache_k_nope: torch.Tensor, cache_k_rope: torch.Tensor
) -> None:
    """Write (nope, rope) rows at token slots loc [T]. Mirrors sglang.kernels.ops.kvcache.mla_buffer."""
    row = torch.cat((cache_k_nope, cache_k_rope), dim=-1)
    kv_buffer[loc] = row.reshape(loc.numel(), *kv_buffer.shape[1:]).to(kv_buffer.dtype)


def sparse_attention(
    self: Any,
    q_all: torch.Tensor,
    kv_cache: torch.Tensor,
    v_head_dim: int,
    page_table_1: torch.Tensor,
    sm_scale: float,
) -> torch.Tensor:
    """Attention [T, H, v] of q_all [T, H, d] over the slots page_table_1 [T, k] (-1 = none) of kv_cache [N, 1, d].

    Mirrors DeepseekSparseAttnBackend._forward_tilelang.
    """
    kv = kv_cache.flatten(0, -2)
    out = q_all.new_empty(*q_all.shape[:2], v_head_dim)
    rows = max(1, SCRATCH // (page_table_1.shape[1] * kv.shape[1]))
    for start in range(0, q_all.shape[0], rows):
        part = slice(start, start + rows)
        slots = page_table_1[part]
        keys = kv[slots.clamp_min(0).long()].float()  # [t, k, d]
        scores = torch.bmm(q_all[part].float(), keys.mT) * sm_scale
        weights = scores.masked_fill(slots[:, None] < 0, float("-inf")).softmax(-1).nan_to_num()
        out[part] = torch.bmm(weights, keys[..., :v_head_dim]).to(out.dtype)
    return out


@functools.cache
def _hadamard(size: int) -> torch.Tensor:
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


def hadamard_transform(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """x · H · scale over the last dimension, a power of two. Mirrors sglang.kernels.ops.quantization.hadamard."""
    return (x.float() @ _hadamard(x.shape[-1]) * scale).to(x.dtype)


def project_head_gates(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Head gates [T, H] fp32 before scaling. Mirrors Indexer._weights_proj_bf16_in_fp32_out."""
    return x.float() @ self.weights_proj.weight.T.float()


def alloc_extend(
    prefix_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    last_loc: torch.Tensor,
    free_pages: torch.Tensor,
    out_indices: torch.Tensor,
    bs_upper: int,
    page_size: int,
) -> None:
    """Fill out_indices [Σ (seq − prefix)] with token slots: the rest of each last page, then free pages in order.

    Mirrors sglang.kernels.ops.memory.allocator.alloc_extend_kernel; the caller notices a lack of pages afterwards.
    """
    extend = seq_lens - prefix_lens
    request = torch.repeat_interleave(torch.arange(len(extend)), extend)
    position = torch.arange(len(out_indices)) - (extend.cumsum(0) - extend - prefix_lens)[request]
    old_pages, all_pages = -(-prefix_lens // page_size), -(-seq_lens // page_size)
    first_new = (all_pages - old_pages).cumsum(0) - (all_pages - old_pages)
    nth = position // page_size - old_pages[request]  # negative: still in the page that the prefix began
    pages = torch.cat((free_pages, free_pages.new_zeros(len(out_indices))))
    fresh = pages[(first_new[request] + nth).clamp_min(0)] * page_size + position % page_size
    out_indices.copy_(torch.where(nth < 0, last_loc[request] + 1 + position - prefix_lens[request], fresh))


def alloc_decode(
    seq_lens: torch.Tensor,
    last_loc: torch.Tensor,
    free_pages: torch.Tensor,
    out_indices: torch.Tensor,
    bs_upper: int,
    page_size: int,
) -> None:
    """One slot a request. Mirrors sglang.kernels.ops.memory.allocator.alloc_decode_kernel."""
    alloc_extend(seq_lens - 1, seq_lens, last_loc, free_pages, out_indices, bs_upper, page_size)


def page_table_rows_prefill(
    page_table: torch.Tensor,
    topk_indices: torch.Tensor,
    extend_lens_cpu: list[int],
    page_size: int = 1,
    output_num_tokens: int | None = None,
    page_table_is_expanded: bool = False,
    cu_seqlens_q: torch.Tensor | None = None,
) -> torch.Tensor:
    """Slots [rows, k] int32 of selected positions, for any top-k; rows without a request are -1.

    page_table has a row a request, or one a token with `page_table_is_expanded`. Mirrors
    transform_index_page_table_prefill.
    """
    rows, topk = topk_indices.shape
    own = page_table
    if not page_table_is_expanded:
        own = page_table.repeat_interleave(torch.tensor(extend_lens_cpu), dim=0)
    real = sum(extend_lens_cpu)
    result = torch.full((output_num_tokens or rows, topk), -1, dtype=torch.int32)
    result[:real] = page_table_rows_decode(own[:real], topk_indices[:real])
    return result


def page_table_rows_decode(page_table: torch.Tensor, topk_indices: torch.Tensor, page_size: int = 1) -> torch.Tensor:
    """Slots [rows, k] int32 of selected positions, for any top-k. Mirrors transform_index_page_table_decode."""
    slots = page_table.gather(1, topk_indices.clamp_min(0).long()).int()
    return slots.masked_fill(topk_indices < 0, -1)


def yarn_rope(
    self: Any,
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    offsets: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate query and key, [T, heads, d] or [T, d] each, in fp32. Mirrors DeepseekScalingRotaryEmbedding.forward_cuda.

    SGLang's own torch version broadcasts a two-dimensional key (the indexer's) wrongly.
    """
    at = positions if offsets is None else positions + offsets
    cos, sin = self.cos_sin_cache[at].float().chunk(2, dim=-1)
    dim, halves = self.rotary_dim, self.is_neox_style
    return _rotate(query, cos, sin, dim, halves), _rotate(key, cos, sin, dim, halves)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dim: int, halves: bool) -> torch.Tensor:
    if x.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    turned = x[..., :dim].float()
    a, b = turned.chunk(2, dim=-1) if halves else (turned[..., ::2], turned[..., 1::2])
    pair = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.cat(pair, dim=-1) if halves else torch.stack(pair, dim=-1).flatten(-2)
    return torch.cat((turned.to(x.dtype), x[..., dim:]), dim=-1)
