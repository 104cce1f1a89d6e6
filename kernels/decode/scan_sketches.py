"""Cheap scores of every sketched key, and the candidates that they leave (CUDA, sm_90)."""

from __future__ import annotations

import torch
import triton

from sglang_misa.kernels.build import build
from sglang_misa.kernels.layout import HEAD_DIM, PAGE
from sglang_misa.kernels.structs import Candidates, Scan

WARPS = 4  # of a thread block of the scan
SPANS = (4, 8, 16)  # pages of a warp
FULL = 4096  # warps that keep the GPU's memory busy
KEY_EXPONENT, KEY_SHIFT = 95, 14  # a score's key: exponents above 2⁻³², and nine of their fraction's bits


def scan_sketches(
    queries: torch.Tensor,
    gates: torch.Tensor,
    page_means: torch.Tensor,
    sketches: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    bits: int,
    residual: bool,
    longer_than: int,
    scores: torch.Tensor,
) -> None:
    """Write `score_keys` of Σ_c gate · ReLU(q · k̂) of every sketched key k̂, in rows of more than `longer_than` tokens.

    The last column has no ReLU where it is a `residual`. Of a key mean + scale · (code - z) the product with z is
    rounded down to a whole number.

    queries:    int8 [R, columns, 128]; columns = 4, 8, 16, 32 or 64
    gates:      fp32 [R, columns]
    page_means: bf16 [P, 128]; sketches: uint8 [P, sketch_bytes(bits)]; page_table: int32 [R, W]; seq_lens: int32 [R]
    scores:     uint16 [R, room], room a multiple of 64 that holds the row

    On the GPU only the launch before it may still be writing what it reads: the columns.
    """
    rows, columns, _ = queries.shape
    if queries.device.type == "cpu":
        _scan_on_cpu(queries, gates, page_means, sketches, page_table, seq_lens, bits, residual, longer_than, scores)
        return
    if rows == 0:
        return
    width = page_table.shape[1]
    span = next((span for span in reversed(SPANS) if rows * triton.cdiv(width, span) >= FULL), SPANS[0])
    module = build("sketch_scan", sketch_bits=bits, columns=columns)
    call = Scan(
        queries=queries,
        gates=gates,
        means=page_means,
        sketches=sketches,
        pages=page_table,
        lens=seq_lens,
        scores=scores,
        pitch=page_table.stride(0),
        room=scores.stride(0),
        columns=columns,
        residual=int(residual),
        candidates=longer_than,
        span=span,
        blocks=triton.cdiv(width, span * WARPS),
    )
    module.scan(bytes(call), rows, torch.cuda.current_stream().cuda_stream)


def list_candidates(scores: torch.Tensor, seq_lens: torch.Tensor, *, positions: torch.Tensor) -> None:
    """List the C best tokens of every row in ascending order; all of a row of no more.

    Tokens without a sketch are always among them. Of equal keys the earlier tokens are in, so the list depends on the
    keys alone.

    scores:    uint16 [R, room], as `scan_sketches` left them
    seq_lens:  int32 [R]
    positions: int32 [R, C], C >= 128; unwritten past a row's length
    """
    if scores.device.type == "cpu":
        _list_on_cpu(scores, seq_lens, positions)
        return
    rows, candidates = positions.shape
    if rows:
        call = Candidates(
            scores=scores, lens=seq_lens, positions=positions, room=scores.stride(0), candidates=candidates
        )
        stream = torch.cuda.current_stream().cuda_stream
        build("sketch_candidates").candidates(bytes(call), rows, stream)


def score_keys(scores: torch.Tensor) -> torch.Tensor:
    """int32 of fp32 scores: 16 bits that order like them, sign, six bits of exponent and nine of fraction; NaN is 0."""
    bits = scores.view(torch.int32)
    size = ((bits & 0x7FFFFFFF) - (KEY_EXPONENT << 23)).clamp(0, (1 << 29) - 1) >> KEY_SHIFT
    keys = torch.where(bits < 0, 0x7FFF - size.clamp_max(0x7FFE), 0x8000 + size)
    return torch.where(scores.isnan(), 0, keys)


def unpack(sketches: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [n, 64, 128] and scales bf16 [n, 64] of sketches [n, sketch_bytes(bits)]."""
    n, size = len(sketches), PAGE * HEAD_DIM * bits // 8
    words = sketches[:, :size].contiguous().view(torch.int32)
    if bits == 1:
        words = words.view(n, 2, 8, 4, 2, 2).permute(0, 1, 4, 2, 3, 5)  # [n, g / 2, g % 2, r, c, w]
    words = words.reshape(n, 4, 8, 1, 4, 2 * bits, 1, 1)
    odd, f, e = torch.arange(2).view(2, 1, 1, 1, 1), torch.arange(4 // bits).view(-1, 1), torch.arange(4)
    shifts = (8 * e + 2 * bits * f + bits * odd).to(words.device)
    codes = (words >> shifts) & (2**bits - 1)  # [n, g, r, odd, c, w, f, e]
    scales = sketches[:, size:].contiguous().view(torch.bfloat16).view(n, 8, 4, 2).transpose(1, 2)
    return codes.reshape(n, PAGE, HEAD_DIM).to(torch.uint8), scales.reshape(n, PAGE)


def _scan_on_cpu(
    queries: torch.Tensor, gates: torch.Tensor, page_means: torch.Tensor, sketches: torch.Tensor,
    page_table: torch.Tensor, seq_lens: torch.Tensor, bits: int, residual: bool, longer_than: int, scores: torch.Tensor,
) -> None:  # fmt: skip
    """The same in PyTorch: what the interpreted kernels around it are tested with."""
    floor = torch.zeros(queries.shape[1], 1)
    if residual:
        floor[-1] = -torch.inf
    for row, length in enumerate(seq_lens.tolist()):
        if length <= longer_than:
            continue
        pages = page_table[row, : length // PAGE - 1].long()
        codes, scales = unpack(sketches[pages], bits)
        query, mean = queries[row].float(), page_means[pages].float() @ queries[row].float().T  # [pages, columns]
        levels = codes.float() @ query.T - ((2**bits - 1) / 2 * query.sum(1)).floor()
        products = (mean.unsqueeze(1) + scales.float().unsqueeze(-1) * levels).flatten(0, 1)  # [tokens, columns]
        score = torch.maximum(products.T, floor).T @ gates[row]
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
