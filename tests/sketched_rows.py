"""Rows of decode on hostile pages with sketches, for tests of the kernels that read them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from oracles import Paged
from paged_rows import make
from torch import Tensor

from sglang_misa import reference
from sglang_misa.kernels.decode.scan_sketches import unpack
from sglang_misa.kernels.decode.topk_sketched import PageSketch
from sglang_misa.kernels.layout import HEAD_DIM, PAGE, sketch_bytes


@dataclass(frozen=True)
class Sketched(Paged):
    """Rows with sketches of their pages; those that must not be read are NaN and ones."""

    sketches: Tensor  # [num_pages, sketch_bytes(bits)] uint8

    @property
    def stats(self) -> PageSketch:
        return PageSketch(self.page_means, self.sketches)


def sketched(lens: tuple[int, ...], bits: int, device: str, *, heads: int = 32, width: int | None = None) -> Sketched:
    batch = make(lens, heads=heads, width=width)
    sketches = torch.full((len(batch.index_k_pages), sketch_bytes(bits)), 0xFF, dtype=torch.uint8)
    for row, length in enumerate(lens):
        pages = batch.page_table[row, : max(length // PAGE - 1, 0)].long()
        if len(pages):
            found = reference.quantize_pages(batch.index_k_pages[pages], batch.page_means[pages], bits)
            sketches[pages] = pack(*found, bits)
    parts = (getattr(batch, field.name) for field in dataclasses.fields(batch))
    return Sketched(*(part.to(device) for part in parts), sketches.to(device))


def pack(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The inverse of `unpack`, code by code as `layout.sketch_bytes` says."""
    n = len(codes)
    words = torch.zeros(n, PAGE * HEAD_DIM * bits // 32, dtype=torch.int64)
    key, dim = torch.meshgrid(torch.arange(PAGE), torch.arange(HEAD_DIM), indexing="ij")
    group, r, odd, c, e = key // 16, key % 16 // 2, key % 2, dim // 32, dim % 4
    lane = 4 * r + c
    if bits == 1:
        word, bit = ((group // 2 * 32 + lane) * 2 + group % 2) * 2 + dim % 32 // 16, 8 * e + 2 * (dim % 16 // 4) + odd
    else:
        word, bit = (group * 32 + lane) * 4 + dim % 32 // 8, 8 * e + 4 * (dim % 8 // 4) + 2 * odd
    words.index_add_(1, word.flatten(), (codes.long() << bit).flatten(1))
    first = torch.arange(PAGE)
    ordered = torch.empty_like(scales)
    ordered[:, first % 16 // 2 * 8 + first // 16 * 2 + first % 2] = scales
    signed = torch.where(words >= 2**31, words - 2**32, words).int()
    return torch.cat([signed.view(torch.uint8), ordered.view(torch.uint8)], 1)


def cheap_scores(batch: Sketched, row: int, queries: Tensor, gates: Tensor, residual: bool) -> Tensor:
    """fp64 scores of a row's sketched tokens by these columns, from the reference's sketched keys."""
    bits = batch.stats.bits
    pages = batch.page_table[row, : int(batch.seq_lens[row]) // PAGE - 1].long()
    codes, scales = unpack(batch.sketches[pages].cpu(), bits)
    keys = reference.sketched_keys(codes, scales, batch.page_means[pages].cpu(), bits).flatten(0, 1).double()
    products = keys @ queries.cpu().double().T
    columns = products.shape[1] - residual
    products[:, :columns].relu_()
    return products @ gates.cpu().double()
