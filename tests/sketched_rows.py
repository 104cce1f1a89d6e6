"""Rows of decode on hostile pages with sketches, for tests of the kernels that read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from oracles import Paged
from paged_rows import make
from torch import Tensor

from sglang_misa import reference_pages
from sglang_misa.kernels.decode.scan_sketches import unpack
from sglang_misa.kernels.decode.topk_sketched import PageSketch
from sglang_misa.kernels.layout import PAGE, sketch_bytes


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
            found = reference_pages.quantize_pages(batch.index_k_pages[pages], batch.page_means[pages], bits)
            sketches[pages] = reference_pages.pack_sketches(*found, bits)
    parts = (getattr(batch, field.name) for field in dataclasses.fields(batch))
    return Sketched(*(part.to(device) for part in parts), sketches.to(device))


def cheap_scores(
    batch: Sketched,
    row: int,
    queries: Tensor,
    gates: Tensor,
    residual: bool,
    of: Callable[[Tensor], Tensor] = Tensor.clone,
) -> Tensor:
    """fp64 scores of a row's sketched tokens by these int8 columns: mean + scale · code, z's product rounded down.

    of: what is added up of columns and gates; `torch.abs` makes it the size of what cancels.
    """
    bits = batch.stats.bits
    pages = batch.page_table[row, : int(batch.seq_lens[row]) // PAGE - 1].long()
    codes, scales = unpack(batch.sketches[pages].cpu(), bits)
    q = queries.cpu().double()
    levels = codes.double() @ q.T - ((2**bits - 1) / 2 * q.sum(1)).floor()
    means = batch.page_means[pages].cpu().double() @ q.T
    products = (means.unsqueeze(1) + scales.double().unsqueeze(-1) * levels).flatten(0, 1)
    columns = products.shape[1] - residual
    products[:, :columns].relu_()
    return of(products) @ of(gates.cpu().double())
