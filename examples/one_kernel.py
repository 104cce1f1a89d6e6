"""Token selection without SGLang: route the newest rows of a prompt, and take their exact top 2048.

On a Hopper GPU the kernels run; elsewhere their twins in PyTorch.
"""

from __future__ import annotations

import torch

from sglang_misa import ops

HEADS, BLOCK, TOPK = 64, 512, 2048
rows, keys = 64, 16384
device = "cuda" if torch.cuda.is_available() else "cpu"
backend: ops.Backend = "kernels" if device == "cuda" else "reference"

torch.manual_seed(0)
index_q = torch.randn(rows, HEADS, 128, device=device).to(torch.float8_e4m3fn)
head_gates = torch.randn(rows, HEADS, device=device) * HEADS**-0.5
index_k = torch.randn(keys, 128, device=device).to(torch.float8_e4m3fn)
k_scale = torch.rand(keys, device=device) + 0.5

ke = torch.arange(keys - rows + 1, keys + 1, dtype=torch.int32, device=device)  # causal: row t sees [0, ke[t])
ks = torch.zeros_like(ke)
row_batch = torch.zeros_like(ke)  # one request
block_means = (index_k.float() * k_scale[:, None]).view(1, -1, BLOCK, 128).mean(2).bfloat16()

queries, pool = ops.Rows(index_q, head_gates, ks, ke), ops.Keys(index_k, k_scale)
blocks = ops.Blocks(block_means, BLOCK, row_batch, ke)
routed = ops.route(index_q, head_gates, blocks, 3, router="error", backend=backend)  # the heads of the preset `fast`
fast = ops.topk_routed(queries, pool, routed, ops.Output.empty(queries, TOPK), backend=backend)
every_head = torch.arange(HEADS, dtype=torch.int32, device=device).expand(rows, -1).contiguous()
exact = ops.RoutedHeads(every_head)
dsa = ops.topk_routed(queries, pool, exact, ops.Output.empty(queries, TOPK), backend=backend)

kept = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(fast, dsa, strict=True)) / (rows * TOPK)
print(f"{backend} on {device}: row 0 is routed to heads {routed.head_ids[0].tolist()} and a residual")
print(f"{kept:.1%} of DSA's tokens are kept; on random inputs, which say nothing about a trained model")
