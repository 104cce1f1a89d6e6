"""Operations of decode called by themselves: each tensor spoiled in turn is refused by its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from sketched_rows import sketched
from torch import Tensor

from sglang_misa.kernels.decode.keep_blocks import KeptPages, keep_blocks
from sglang_misa.kernels.decode.operands import Chosen, PagedRows, PageSketch, SketchPolicy
from sglang_misa.kernels.decode.route_pages import Columns, route_pages
from sglang_misa.kernels.decode.scan_sketches import list_candidates, scan_sketches
from sglang_misa.kernels.decode.topk_kept import topk_kept, topk_listed
from sglang_misa.kernels.layout import PAGE

LENS, WIDTH, K, C = (300, 64, 500), 8, 32, 128
CPU, ROWS = torch.device("cpu"), len(LENS)
BATCH = sketched(LENS, 2, "cpu", width=WIDTH)
POLICY = SketchPolicy(7, "peak", True, C)


def scan(**given: Tensor) -> None:
    columns = Columns(given["columns.queries"], given["columns.gates"])
    rows = replace(BATCH.operands, page_table=given["page_table"], seq_lens=given["seq_lens"])
    stats = PageSketch(given["stats.means"], given["stats.sketches"])
    scan_sketches(columns, rows, stats, POLICY, scores=given["scores"])


def rows_of(given: dict[str, Tensor]) -> tuple[PagedRows, Tensor]:
    names = ("index_q", "head_gates", "index_k_pages", "page_table", "seq_lens")
    return PagedRows(*(given[name] for name in names)), given["page_means"]


def keep(**given: Tensor) -> None:
    keep_blocks(*rows_of(given), out=KeptPages.allocate(ROWS, WIDTH, 4, PAGE, CPU))


def route(**given: Tensor) -> None:
    route_pages(*rows_of(given), POLICY, out=Columns.allocate(ROWS, 8, CPU))


def kept_topk(**given: Tensor) -> None:
    kept = KeptPages(given["kept.pages"], given["kept.blocks"], given["kept.lens"], torch.empty(0), torch.empty(0))
    topk_kept(given["logits"], kept, Chosen(given["out.slots"], given["out.positions"]))


def listed_topk(**given: Tensor) -> None:
    out = Chosen(given["out.slots"], given["out.positions"])
    topk_listed(given["logits"], given["listed"], given["page_table"], given["seq_lens"], out)


def made() -> dict[Callable[..., None], dict[str, Tensor]]:
    """Each operation with tensors that it takes, by the names that its errors call them."""
    ints: Any = {"dtype": torch.int32}
    table = {"page_table": BATCH.page_table, "seq_lens": BATCH.seq_lens}
    out = {"out.slots": torch.empty(ROWS, K, **ints), "out.positions": torch.empty(ROWS, K, **ints)}
    positions = torch.arange(C, **ints).repeat(ROWS, 1)
    whole = {
        "index_q": BATCH.index_q,
        "head_gates": BATCH.head_gates,
        "index_k_pages": BATCH.index_k_pages,
        "page_means": BATCH.page_means,
        **table,
    }
    return {
        keep: whole,
        route: whole,
        scan: {
            "columns.queries": torch.ones(ROWS, 8, 128, dtype=torch.int8),
            "columns.gates": torch.ones(ROWS, 8),
            "stats.means": BATCH.page_means,
            "stats.sketches": BATCH.sketches,
            "scores": torch.zeros(ROWS, WIDTH * PAGE, dtype=torch.uint16),
            **table,
        },
        list_candidates: {
            "scores": torch.zeros(ROWS, WIDTH * PAGE, dtype=torch.uint16),
            "positions": positions,
            "seq_lens": BATCH.seq_lens,
        },
        kept_topk: {
            "logits": torch.rand(ROWS, 2 * PAGE),
            "kept.pages": torch.ones(ROWS, 2, **ints),
            "kept.blocks": torch.zeros(ROWS, 2, **ints),
            "kept.lens": torch.full((ROWS,), 2 * PAGE, **ints),
            **out,
        },
        listed_topk: {"logits": torch.rand(ROWS, C), "listed": positions, **table, **out},
    }


def apart(tensor: Tensor) -> Tensor:
    """The same numbers, the last dimension's two elements apart."""
    return torch.stack([tensor, tensor], -1).flatten(-2)[..., ::2]


SPOILED: dict[str, Callable[[Tensor], Tensor]] = {
    "dtype": lambda tensor: tensor.to(torch.float64),
    "rows": lambda tensor: tensor[:-1],
    "dimensions": lambda tensor: tensor.unsqueeze(0),
    "strides": apart,
    "device": lambda tensor: tensor.to("meta"),
}
CASES = [(call, name) for call, given in made().items() for name in given]


@pytest.mark.parametrize("call", made(), ids=lambda call: call.__name__)
def test_what_fits_is_taken(call):
    call(**made()[call])


@pytest.mark.parametrize("how", SPOILED)
@pytest.mark.parametrize(("call", "name"), CASES, ids=[f"{call.__name__}-{name}" for call, name in CASES])
def test_a_spoiled_tensor_is_refused_by_name(call, name, how):
    """The first tensor of a call says how many rows and which device; when it is the odd one, the next one is named."""
    given = made()[call]
    leads = {
        "rows": {"index_q", "index_k_pages", "stats.means", "logits", "positions"},
        "device": {"index_q", "columns.queries", "logits", "positions"},
    }
    named = ".*" if name in leads.get(how, ()) else name
    with pytest.raises(ValueError, match=f"^{named}: expected .*, got .* on "):
        call(**given | {name: SPOILED[how](given[name])})


def test_numbers_that_no_kernel_is_built_for():
    calls = made()
    odd = {"columns.queries": torch.ones(ROWS, 6, 128, dtype=torch.int8), "columns.gates": torch.ones(ROWS, 6)}
    with pytest.raises(ValueError, match=r"columns: expected \(4, 8, 16, 32, 64\) of a row, got 6; change"):
        scan(**calls[scan] | odd)
    with pytest.raises(ValueError, match="scores: expected rows of 8 pages of 64 or more"):
        scan(**calls[scan] | {"scores": torch.zeros(ROWS, 7 * PAGE, dtype=torch.uint16)})
    with pytest.raises(ValueError, match="positions: expected room for 128 or more a row, got 64"):
        list_candidates(**calls[list_candidates] | {"positions": torch.zeros(ROWS, 64, dtype=torch.int32)})
    for room in (130, 32772):
        with pytest.raises(ValueError, match=f"logits: expected at most 32768 scores .* got {room}"):
            kept_topk(**calls[kept_topk] | {"logits": torch.rand(ROWS, room)})
