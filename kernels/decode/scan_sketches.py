"""Cheap scores of every sketched key, and the candidates that they leave (CUDA, sm_90)."""

from __future__ import annotations

import torch
import triton

from sglang_misa.kernels.build import build, resident, stream_of
from sglang_misa.kernels.checks import expect
from sglang_misa.kernels.decode.operands import MIN_CANDIDATES, PagedRows, PageSketch, SketchPolicy
from sglang_misa.kernels.decode.route_pages import Columns
from sglang_misa.kernels.layout import HEAD_DIM, PAGE, ROUTED_HEADS
from sglang_misa.kernels.structs import Candidates, Scan

WARPS = 4  # of a thread block of the scan
LEAST_PAGES = 4  # of a warp
START = 2  # what a warp's start costs, in pages
KEY_SCALE, KEY_SHIFT = 2.0**-94, 14  # a score's key: exponents from 2⁻³² on, linear below, and nine bits of fraction
LARGEST_SIZE = 0x7FFE  # so that no number's key is NaN's


def scan_sketches(
    columns: Columns, rows: PagedRows, stats: PageSketch, policy: SketchPolicy, *, scores: torch.Tensor
) -> None:
    """Write `score_keys` of Σ_c gate · ReLU(q · k̂) of every sketched key k̂, in rows of more tokens than candidates.

    The last column has no ReLU where it is a residual. Of a key mean + scale · (code - z) the product with z is
    rounded down to a whole number.

    columns: 4, 8, 16, 32 or 64 of a row
    rows:    only their page table and lengths are read
    scores:  uint16 [R, room], room a multiple of 64 that holds the row

    On the GPU only the launch before it may still be writing what it reads: the columns.
    """
    _check_scan(columns, rows, stats, scores)
    if rows.interpreted:
        _scan_on_cpu(columns, rows, stats, policy, scores)
        return
    if len(rows) == 0:
        return
    count, width = columns.queries.shape[1], rows.page_table.shape[1]
    shape = {"sketch_bits": stats.bits, "columns": count}
    module = build("sketch_scan", **shape)
    span = span_of(len(rows), width, module.most_pages(), resident("sketch_scan", **shape))
    call = Scan(
        queries=columns.queries,
        gates=columns.gates,
        means=stats.means,
        sketches=stats.sketches,
        pages=rows.page_table,
        lens=rows.seq_lens,
        scores=scores,
        pitch=rows.page_table.stride(0),
        room=scores.stride(0),
        columns=count,
        residual=int(policy.residual),
        candidates=policy.candidates,
        span=span,
        blocks=triton.cdiv(width, span * WARPS),
    )
    module.scan(bytes(call), len(rows), stream_of(scores.device))


def span_of(rows: int, width: int, most: int, resident: int) -> int:
    """Pages of a warp, at most `most`, that take least time: `resident` blocks run at once, a few left over as long."""

    def time(span: int) -> int:
        blocks = rows * -(-width // (span * WARPS))
        return -(-blocks // resident) * (span + START)

    return min(range(LEAST_PAGES, most + 1), key=time)


def list_candidates(scores: torch.Tensor, seq_lens: torch.Tensor, *, positions: torch.Tensor) -> None:
    """List the C best tokens of every row in ascending order; all of a row of no more.

    Tokens without a sketch are always among them. Of equal keys the earlier tokens are in, so the list depends on the
    keys alone.

    scores:    uint16 [R, room], as `scan_sketches` left them; undefined afterwards, so that they need not reach memory
    seq_lens:  int32 [R]
    positions: int32 [R, C], C >= 128; unwritten past a row's length
    """
    expect("positions", positions, (len(positions), None), torch.int32)
    rows, candidates = positions.shape
    expect("scores", scores, (rows, None), torch.uint16, row_stride=True, device=positions.device)
    expect("seq_lens", seq_lens, (rows,), torch.int32, device=positions.device)
    if candidates < MIN_CANDIDATES:
        raise ValueError(f"positions: expected room for {MIN_CANDIDATES} or more a row, got {candidates}; widen it")
    if scores.device.type == "cpu":
        _list_on_cpu(scores, seq_lens, positions)
        return
    if rows:
        call = Candidates(
            scores=scores, lens=seq_lens, positions=positions, room=scores.stride(0), candidates=candidates
        )
        build("sketch_candidates").candidates(bytes(call), rows, stream_of(scores.device))


def score_keys(scores: torch.Tensor) -> torch.Tensor:
    """int32 of fp32 scores: 16 bits that order like them, sign, six bits of exponent and nine of fraction; NaN is 0."""
    size = (scores * KEY_SCALE).abs().view(torch.int32).bitwise_right_shift(KEY_SHIFT).clamp_max(LARGEST_SIZE)
    return torch.where(scores.isnan(), 0, torch.where(scores.signbit(), 0x7FFF - size, 0x8000 + size))


def unpack(sketches: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [n, 64, 128] and scales bf16 [n, 64] of sketches [n, sketch_bytes(bits)]."""
    n, size = len(sketches), PAGE * HEAD_DIM * bits // 8
    words = sketches[:, :size].contiguous().view(torch.int32).view(n, bits, 2, 8, 4, 4).permute(0, 1, 3, 4, 2, 5)
    words = words.reshape(n, bits, 1, 8, 1, 4, 2, 4, 1)
    plane = torch.arange(8 // bits).view(-1, 1, 2, 1, 1, 1, 1)  # group and odd
    shifts = (8 * torch.arange(4) + bits * plane).to(words.device)
    codes = (words >> shifts) & (2**bits - 1)  # [n, half, group, r, odd, c, u, w, e]
    scales = sketches[:, size:].contiguous().view(torch.bfloat16).view(n, 8, 4, 2).transpose(1, 2)
    return codes.reshape(n, PAGE, HEAD_DIM).to(torch.uint8), scales.reshape(n, PAGE)


def _check_scan(columns: Columns, rows: PagedRows, stats: PageSketch, scores: torch.Tensor) -> None:
    """Raise ValueError unless these belong together, on one device."""
    device, pages, count = columns.queries.device, len(stats.means), columns.queries.shape[1]
    expect("columns.queries", columns.queries, (len(rows), count, HEAD_DIM), torch.int8)
    if count not in ROUTED_HEADS:
        raise ValueError(f"columns: expected {ROUTED_HEADS} of a row, got {count}; change heads or residual")
    expect("columns.gates", columns.gates, (len(rows), count), torch.float32, device=device)
    rows.check_table(device)
    expect("stats.means", stats.means, (pages, HEAD_DIM), torch.bfloat16, device=device)
    expect("stats.sketches", stats.sketches, (pages, None), torch.uint8, device=device)  # of `bits`, or it raises
    expect("scores", scores, (len(rows), None), torch.uint16, row_stride=True, device=device)
    if scores.shape[1] < rows.page_table.shape[1] * PAGE or scores.stride(0) % PAGE:
        raise ValueError(
            f"scores: expected rows of {rows.page_table.shape[1]} pages of {PAGE} or more, a multiple of {PAGE} apart, "
            f"got {tuple(scores.shape)} with strides {scores.stride()}; allocate it for the page table"
        )


def _scan_on_cpu(
    columns: Columns, rows: PagedRows, stats: PageSketch, policy: SketchPolicy, scores: torch.Tensor
) -> None:
    """The same in PyTorch: what the interpreted kernels around it are tested with."""
    floor = torch.zeros(columns.queries.shape[1], 1)
    if policy.residual:
        floor[-1] = -torch.inf
    for row, length in enumerate(rows.seq_lens.tolist()):
        if length <= policy.candidates:
            continue
        pages = rows.page_table[row, : length // PAGE - 1].long()
        codes, scales = unpack(stats.sketches[pages], stats.bits)
        query = columns.queries[row].float()
        mean = stats.means[pages].float() @ query.T  # [pages, columns]
        levels = codes.float() @ query.T - ((2**stats.bits - 1) / 2 * query.sum(1)).floor()
        products = (mean.unsqueeze(1) + scales.float().unsqueeze(-1) * levels).flatten(0, 1)  # [tokens, columns]
        score = torch.maximum(products.T, floor).T @ columns.gates[row]
        scores[row, : len(score)] = score_keys(score).to(torch.uint16)


def _list_on_cpu(scores: torch.Tensor, seq_lens: torch.Tensor, positions: torch.Tensor) -> None:
    """The same in PyTorch."""
    candidates = positions.shape[1]
    for row, length in enumerate(seq_lens.tolist()):
        token = torch.arange(length, dtype=torch.int32)
        if length > candidates:
            scored = (length // PAGE - 1) * PAGE
            keys = scores[row, :scored].to(torch.int32)
            best = keys.sort(descending=True, stable=True).indices[: candidates - (length - scored)]
            token = torch.cat([token[best.sort().values], token[scored:]])
        positions[row, : len(token)] = token
