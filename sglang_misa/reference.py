"""The algorithms in plain fp32 PyTorch: the oracle of every kernel test, and the engine where there is no kernel.

Shapes carry a leading N: an extend call is one request with T query rows (N = 1), a decode call is N requests with
one row each. D = 128 dimensions, H index heads, h routed heads, L keys, P = L // 64 complete pages, M blocks.

No function reads a tensor back to the host, so all of them can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sglang_misa.config import Router, SelectionPolicy
from sglang_misa.kernels.layout import HEAD_DIM, PAGE

LOWEST = torch.finfo(torch.float32).min

_CHUNK_ELEMENTS = 1 << 26  # fp32 [rows, heads, keys] held at once: 256 MiB


def dequantize_pages(pages: Tensor) -> Tensor:
    """Keys [n, 64, 128] fp32 of index-K page rows [n, 8448] uint8 (SGLang's DSATokenToKVPool layout)."""
    keys = pages[:, : PAGE * HEAD_DIM].reshape(-1, PAGE, HEAD_DIM).view(torch.float8_e4m3fn)
    scales = pages[:, PAGE * HEAD_DIM :].contiguous().view(torch.float32)
    return keys.float() * scales.unsqueeze(-1)


def page_means(pages: Tensor) -> Tensor:
    """Mean key [n, 128] fp32 of each page row [n, 8448] uint8. Only meaningful for complete pages."""
    return dequantize_pages(pages).mean(dim=1)


def block_means(means: Tensor, block_pages: int) -> Tensor:
    """Mean keys k̃ [N, M, 128] of M = P // block_pages complete blocks, from page means [N, P, 128].

    Rounded to bf16, as the kernels multiply them (and the authors' code), and returned as fp32.
    """
    n, pages, dim = means.shape
    blocks = pages // block_pages
    return means[:, : blocks * block_pages].float().reshape(n, blocks, block_pages, dim).mean(dim=2).bfloat16().float()


def index_scores(index_q: Tensor, head_gates: Tensor, keys: Tensor) -> Tensor:
    """DSA scores I[t, s] = Σ_j w[t, j] · ReLU(q[t, j] · k[s]).

    index_q [N, T, H, 128], head_gates [N, T, H], keys [N, L, 128] (any float dtype) → fp32 [N, T, L].
    """
    n, rows, heads, _ = index_q.shape
    length = keys.shape[1]
    scores = torch.empty(n, rows, length, dtype=torch.float32, device=keys.device)
    step = max(1, _CHUNK_ELEMENTS // max(1, n * heads * length))
    keys_t = keys.float().transpose(1, 2)
    for start in range(0, rows, step):
        q = index_q[:, start : start + step].float()
        dots = torch.matmul(q.flatten(1, 2), keys_t).unflatten(1, q.shape[1:3]).relu_()  # [N, step, H, L]
        gates = head_gates[:, start : start + step].float().unsqueeze(2)  # [N, step, 1, H]
        scores[:, start : start + step] = torch.matmul(gates, dots).squeeze(2)
    return scores


def block_statistics(
    index_q: Tensor, head_gates: Tensor, k_tilde: Tensor, complete: Tensor, router: Router
) -> tuple[Tensor, Tensor]:
    """Router statistic E [N, T, H] and block scores [N, T, M], from one product with the block means.

    index_q [N, T, H, 128], head_gates [N, T, H], k_tilde [N, M, 128], complete [N, T]: blocks complete at the row's own
    length. E is the mean over those blocks (arXiv 2605.07363, Eq. 7); without any, or for `weight`, it is |w|.
    Blocks that are not complete score -inf.
    """
    n, rows, heads, _ = index_q.shape
    blocks = k_tilde.shape[1]
    gates = head_gates.float()
    if blocks == 0:
        return gates.abs(), gates.new_empty(n, rows, 0)
    statistic = torch.empty_like(gates)
    block_scores = gates.new_empty(n, rows, blocks)
    visible = torch.arange(blocks, device=k_tilde.device) < complete.unsqueeze(-1)  # [N, T, M]
    step = max(1, _CHUNK_ELEMENTS // max(1, n * heads * blocks))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        q, w, seen = index_q[:, part].float(), gates[:, part], visible[:, part]
        dots = torch.matmul(q.flatten(1, 2), k_tilde.float().transpose(1, 2)).unflatten(1, q.shape[1:3]).relu_()
        block_scores[:, part] = torch.matmul(w.unsqueeze(2), dots).squeeze(2).masked_fill_(~seen, -torch.inf)
        activity = dots.masked_fill_(~seen.unsqueeze(2), 0.0).sum(-1) / seen.sum(-1, keepdim=True).clamp_min(1)
        statistic[:, part] = {"abs": w.abs() * activity, "signed": w * activity, "weight": w.abs()}[router]
    return torch.where(complete.unsqueeze(-1) > 0, statistic, gates.abs()), block_scores


def top_heads(statistic: Tensor, heads: int) -> Tensor:
    """Ids int64 [N, T, h], ascending, of the largest of [N, T, H]; ties go to the lower head, NaN never wins."""
    ranked = torch.nan_to_num(statistic, nan=-torch.inf, posinf=torch.inf, neginf=LOWEST)
    order = torch.sort(ranked, dim=-1, descending=True, stable=True).indices
    return order[..., :heads].sort(dim=-1).values


def best_blocks(block_scores: Tensor, complete: Tensor, blocks: int) -> Tensor:
    """Ids int64 [N, T, min(blocks, M)] of the blocks to keep: the first, the newest complete one, then the best.

    block_scores [N, T, M], complete [N, T]. Blocks that are not complete come last. Ties go to the earlier block, NaN
    never wins.
    """
    index = torch.arange(block_scores.shape[-1], device=block_scores.device)
    newest = complete.unsqueeze(-1) - 1
    ranked = torch.nan_to_num(block_scores, nan=LOWEST, posinf=torch.finfo(torch.float32).max, neginf=LOWEST)
    ranked = ranked.masked_fill((index == 0) | (index == newest), torch.inf).masked_fill(index > newest, -torch.inf)
    return torch.sort(ranked, dim=-1, descending=True, stable=True).indices[..., :blocks]


def keep_blocks(block_scores: Tensor, complete: Tensor, blocks: int) -> Tensor:
    """Mask [N, T, M] of the complete blocks that `best_blocks` keeps. Arguments as there."""
    visible = torch.arange(block_scores.shape[-1], device=block_scores.device) < complete.unsqueeze(-1)
    best = best_blocks(block_scores, complete, blocks)
    return torch.zeros_like(visible).scatter_(-1, best, True) & visible


def policy_scores(
    policy: SelectionPolicy, index_q: Tensor, head_gates: Tensor, keys: Tensor, means: Tensor, row_lens: Tensor
) -> Tensor:
    """Scores fp32 [N, T, L] whose top k is the policy's selection; -inf where a token is out of it.

    index_q [N, T, H, 128], head_gates [N, T, H], keys [N, L, 128], means [N, P, 128] of the complete pages, row_lens
    [N, T]: keys row t sees. A visible token whose score is NaN or -inf gets the lowest finite score, so that a row
    never has fewer than min(k, row_len) tokens to choose from.
    """
    position = torch.arange(keys.shape[1], device=keys.device)
    visible = position < row_lens.unsqueeze(-1)  # [N, T, L]
    if not policy.active:
        return _finite(index_scores(index_q, head_gates, keys), visible)

    complete = row_lens // policy.block_size
    k_tilde = block_means(means, policy.block_size // PAGE)
    statistic, block_scores = block_statistics(index_q, head_gates, k_tilde, complete, policy.router)
    if policy.heads is None:
        scores = index_scores(index_q, head_gates, keys)
    else:
        ids = top_heads(statistic, policy.heads)
        routed_q = index_q.float().gather(2, ids.unsqueeze(-1).expand(*ids.shape, index_q.shape[-1]))
        scores = index_scores(routed_q, head_gates.float().gather(2, ids), keys)

    kept = visible
    if policy.blocks is not None and block_scores.shape[-1] > 0:
        block = (position // policy.block_size).clamp_max(block_scores.shape[-1] - 1)
        tail = position >= (complete * policy.block_size).unsqueeze(-1)
        kept = visible & (tail | keep_blocks(block_scores, complete, policy.blocks)[..., block])
    scores = _finite(scores, kept)

    if policy.candidates is not None and policy.candidates < keys.shape[1]:
        best = scores.topk(policy.candidates, dim=-1).indices
        kept = kept & torch.zeros_like(kept).scatter_(-1, best, True)
    if policy.candidates is not None:
        scores = _finite(index_scores(index_q, head_gates, keys), kept)
    return scores


def row_chunks(rows: int, length: int) -> Iterator[tuple[int, int]]:
    """Row ranges whose fp32 [rows, length] scores stay within the chunk budget."""
    step = max(1, _CHUNK_ELEMENTS // max(1, length))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _finite(scores: Tensor, kept: Tensor) -> Tensor:
    """`scores` with NaN and -inf raised to the lowest finite value where kept, and -inf elsewhere."""
    scores = torch.nan_to_num(scores, nan=LOWEST, posinf=torch.inf, neginf=LOWEST)
    return scores.masked_fill_(~kept, -torch.inf)
