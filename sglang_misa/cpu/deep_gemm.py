"""The four functions of `deep_gemm` that SGLang's DSA indexer calls, in torch, with DeepGEMM's arguments.

Score of query row t and token s (DeepSeek-V3.2 report, section 2.1): k_scale[s] · Σ_h w[t,h] · ReLU(q[t,h] · k[s]).
"""

from __future__ import annotations

import torch

from sglang_misa.kernels.layout import HEAD_DIM as DIM
from sglang_misa.kernels.layout import PAGE

SCRATCH = 1 << 24  # fp32 elements of per-head scores held at once: 64 MiB


def get_num_sms() -> int:
    return 1


def get_paged_mqa_logits_metadata(context_lens: torch.Tensor, block_kv: int, num_sms: int) -> torch.Tensor:
    """The work schedule of a GPU kernel: nothing to plan here."""
    return torch.empty(0, dtype=torch.int32)


def fp8_mqa_logits(
    q: torch.Tensor,
    kv: tuple[torch.Tensor, torch.Tensor],
    weights: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
    clean_logits: bool = True,
) -> torch.Tensor:
    """Scores [T, S] fp32 of q [T, H, D] fp8 with keys ([S, D] fp8, [S] fp32 scales), weights [T, H] fp32.

    Row t is defined in columns ks[t] ≤ s < ke[t], and -inf elsewhere whatever `clean_logits` says.
    """
    keys, scales = kv
    logits = torch.full((q.shape[0], keys.shape[0]), float("-inf"))
    rows = max(1, SCRATCH // (q.shape[1] * max(1, keys.shape[0])))
    for start in range(0, q.shape[0], rows):
        part = slice(start, start + rows)
        low, high = int(ks[part].min()), int(ke[part].max())
        if low >= high:
            continue
        scores = _score(q[part], keys[low:high], scales[low:high], weights[part])
        column = torch.arange(low, high)
        seen = (column >= ks[part, None]) & (column < ke[part, None])
        logits[part, low:high] = scores.masked_fill(~seen, float("-inf"))
    return logits


def fp8_paged_mqa_logits(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    schedule_metadata: torch.Tensor,
    max_context_len: int,
    clean_logits: bool = True,
) -> torch.Tensor:
    """Scores [B·n, max_context_len] fp32 of q [B, n, H, D] fp8 with the pages kv_cache [P, 64, 1, 132] uint8.

    A page is 64×128 fp8 keys, then 64 fp32 scales. weights [B·n, H] fp32, context_lens [B, n], block_table [B, W].
    Columns at or after a row's length are -inf.
    """
    batch, queries = q.shape[:2]
    pages = kv_cache.reshape(kv_cache.shape[0], -1)
    logits = torch.full((batch * queries, max_context_len), float("-inf"))
    for row in range(batch * queries):
        b_i, q_i = divmod(row, queries)
        length = int(context_lens[b_i, q_i])
        if length == 0:
            continue
        own = pages[block_table[b_i, : -(-length // PAGE)].long()]
        keys = own[:, : PAGE * DIM].reshape(-1, DIM).view(torch.float8_e4m3fn)[:length]
        scales = own[:, PAGE * DIM :].contiguous().view(torch.float32).reshape(-1)[:length]
        logits[row, :length] = _score(q[b_i, q_i, None], keys, scales, weights[row, None])[0]
    return logits


def _score(q: torch.Tensor, keys: torch.Tensor, scales: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """[t, s] from q [t, H, D], keys [s, D], scales [s], weights [t, H]."""
    heads = torch.relu(q.float() @ keys.float().T)  # [t, H, s]
    return torch.bmm(weights[:, None, :], heads)[:, 0] * scales
