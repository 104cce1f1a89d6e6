"""Decode over page sketches on a GPU: checked first, then timed stage by stage at graph replay, beside stock and HISA.

    python bench/tune_sketch.py [--quick] [layer.safetensors of trained index tensors ...]

Nothing is timed after a wrong result. Times are µs a call: medians of replays of a graph that holds one call for each
of several input sets. Writes $OUT/sketch.json when OUT is set.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sglang_misa import reference
from sglang_misa.bench.timing import graph_us
from sglang_misa.kernels.decode.route_pages import route_pages
from sglang_misa.kernels.decode.scan_sketches import list_candidates, scan_sketches, score_keys, unpack
from sglang_misa.kernels.decode.topk_blocks import DecodeScratch, decode_topk
from sglang_misa.kernels.decode.topk_kept import topk_listed
from sglang_misa.kernels.decode.topk_sketched import PageSketch, SketchPolicy, SketchScratch, rescore, sketch_topk
from sglang_misa.kernels.layout import HEAD_DIM, PAGE, PAGE_BYTES, sketch_bytes
from sglang_misa.kernels.page_means import Layers, update_last_page_means, update_page_means, update_slots

KIB = 1024
TOPK = 2048
TABLE_WIDTH = 2188  # pages of a 140,000-token context
POOL_PAGES = (1 << 18) + 320
REPLAYS = 15
BANDWIDTH = 4.3e12  # bytes a second that an H200 reads
TOLERANCE = 2e-3  # of the largest score: the tensor cores add fp8 products with fewer than fp32's bits
STAGES = ("route", "scan", "list", "rescore", "topk")


class Wrong(Exception):
    pass


def expect(condition: Any, message: str) -> None:
    if not bool(condition):
        raise Wrong(message)


@dataclass(frozen=True)
class Pool:
    pages: Tensor
    stats: dict[int, PageSketch]  # by bits

    @classmethod
    def of(cls, pages: Tensor) -> Pool:
        """Statistics of all pages by the kernel, as of one long request."""
        stats = {}
        table = torch.arange(len(pages), dtype=torch.int32, device=pages.device).view(1, -1)
        lens = torch.tensor([len(pages) * PAGE], dtype=torch.int32, device=pages.device)
        for bits in (1, 2):
            means = torch.empty(len(pages), HEAD_DIM, dtype=torch.bfloat16, device=pages.device)
            sketches = torch.empty(len(pages), sketch_bytes(bits), dtype=torch.uint8, device=pages.device)
            update_page_means(pages, means, table, lens, PAGE, sketches)
            stats[bits] = PageSketch(means, sketches)
        return cls(pages, stats)


def random_pages(count: int) -> Tensor:
    """Keys with a drift over the pages; page 0 is NaN and belongs to nobody."""
    pages = torch.empty(count, PAGE_BYTES, dtype=torch.uint8, device="cuda")
    for part in torch.arange(count, device="cuda").split(1 << 13):
        n = len(part)
        keys = torch.randn(n, PAGE, HEAD_DIM, device="cuda") + 0.7 * torch.randn(n, 1, HEAD_DIM, device="cuda")
        pages[part, : PAGE * HEAD_DIM] = keys.to(torch.float8_e4m3fn).view(n, -1).view(torch.uint8)
        pages[part, PAGE * HEAD_DIM :] = (torch.rand(n, PAGE, device="cuda") + 0.5).view(torch.uint8)
    pages[0] = 0x7F
    return pages


@dataclass(frozen=True)
class Inputs:
    index_q: Tensor
    head_gates: Tensor
    page_table: Tensor
    seq_lens: Tensor


def random_inputs(lens: list[int], heads: int, seed: int, width: int = TABLE_WIDTH) -> Inputs:
    torch.manual_seed(seed)
    ids = torch.randperm(POOL_PAGES - 1, device="cuda") + 1
    table = torch.full((len(lens), width), 2**31 - 1, dtype=torch.int32, device="cuda")
    start = 0
    for row, length in enumerate(lens):
        count = -(-length // PAGE)
        table[row, :count] = ids[start : start + count].int()
        start += count
    return Inputs(
        torch.randn(len(lens), heads, HEAD_DIM, device="cuda").to(torch.float8_e4m3fn),
        torch.randn(len(lens), heads, device="cuda") * 0.1 + 0.05,
        table,
        torch.tensor(lens, dtype=torch.int32, device="cuda"),
    )


@dataclass(frozen=True)
class Call:
    """One decode call over sketches with everything it writes."""

    pool: Pool
    bits: int
    inputs: Inputs
    scratch: SketchScratch
    out: Tensor
    positions: Tensor | None = None

    @classmethod
    def of(cls, pool: Pool, bits: int, inputs: Inputs, policy: SketchPolicy, *, check: bool = False) -> Call:
        rows, heads, _ = inputs.index_q.shape
        scratch = SketchScratch.allocate(rows, inputs.page_table.shape[1], heads, policy, torch.device("cuda"))
        out = torch.full((rows, TOPK), -7, dtype=torch.int32, device="cuda")
        if check:
            scratch.keys.view(torch.uint8).fill_(0xFF)
            scratch.positions.fill_(2**31 - 1)
            scratch.logits.fill_(torch.nan)
            if scratch.columns is not None:
                scratch.columns.queries.view(torch.uint8).fill_(0x7F)
                scratch.columns.gates.fill_(torch.nan)
                scratch.columns.partial.fill_(torch.nan)
        return cls(pool, bits, inputs, scratch, out, out.clone() if check else None)

    def whole(self) -> None:
        i = self.inputs
        sketch_topk(
            i.index_q, i.head_gates, self.pool.pages, self.pool.stats[self.bits], i.page_table, i.seq_lens,
            scratch=self.scratch, out=self.out, positions=self.positions,
        )  # fmt: skip

    def route(self) -> None:
        i, policy = self.inputs, self.scratch.policy
        if self.scratch.columns is not None and policy.heads is not None:
            route_pages(
                i.index_q, i.head_gates, self.pool.stats[self.bits].means, i.page_table, i.seq_lens, heads=policy.heads,
                router=policy.router, residual=policy.residual, longer_than=policy.candidates, out=self.scratch.columns,
            )  # fmt: skip

    def scan(self) -> None:
        i, columns, stats = self.inputs, self.scratch.columns, self.pool.stats[self.bits]
        queries, gates = (i.index_q, i.head_gates) if columns is None else (columns.queries, columns.gates)
        scan_sketches(
            queries, gates, stats.means, stats.sketches, i.page_table, i.seq_lens,
            bits=self.bits, leads=columns is None,
            residual=self.scratch.policy.residual, longer_than=self.scratch.policy.candidates, scores=self.scratch.keys,
        )  # fmt: skip

    def list(self) -> None:
        list_candidates(self.scratch.keys, self.inputs.seq_lens, positions=self.scratch.positions)

    def rescore(self) -> None:
        i = self.inputs
        rescore(i.index_q, i.head_gates, self.pool.pages, i.page_table, i.seq_lens, topk=TOPK, scratch=self.scratch)

    def topk(self) -> None:
        i = self.inputs
        topk_listed(
            self.scratch.logits,
            self.scratch.positions,
            i.page_table,
            i.seq_lens,
            out=self.out,
            positions=self.positions,
        )


def check_quantiser(pages: Tensor) -> None:
    """The kernel's bits against the reference's, at extend, for slots and for the newest page."""
    pages = pages[:256].clone()
    pages[1, PAGE * HEAD_DIM : PAGE * HEAD_DIM + 4] = 0xFF
    pages[2, PAGE * HEAD_DIM :] = 0
    table = torch.arange(256, dtype=torch.int32, device="cuda").view(-1, 1)
    lens = torch.full((256,), PAGE, dtype=torch.int32, device="cuda")
    for bits in (1, 2):
        seen = []
        for kind in range(3):
            means = torch.zeros(256, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
            sketches = torch.zeros(256, sketch_bytes(bits), dtype=torch.uint8, device="cuda")
            if kind == 0:
                update_page_means(pages, means, table, lens, PAGE, sketches)
            elif kind == 1:
                update_slots(pages, means, torch.arange(256, device="cuda") * PAGE + PAGE - 1, sketches)
            else:
                update_last_page_means(Layers.of([pages], [means], [sketches]), table, lens)
            codes, scales = reference.quantize_pages(pages, means, bits)
            own = unpack(sketches, bits)
            wrong = (own[0] != codes).sum(), (own[1].view(torch.int16) != scales.view(torch.int16)).sum()
            expect(
                not wrong[0] and not wrong[1], f"{bits} bits, entry {kind}: {wrong[0]} codes, {wrong[1]} scales differ"
            )
            seen.append(sketches)
        expect(torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2]), f"{bits} bits: entries differ")


def check(call: Call, what: str, rows: int = 6) -> None:
    """Columns, keys, candidates and selection of some rows against PyTorch, from the step's own intermediates."""
    call.whole()
    torch.cuda.synchronize()
    assert call.positions is not None
    i, scratch, policy, stats = call.inputs, call.scratch, call.scratch.policy, call.pool.stats[call.bits]
    lens = i.seq_lens.tolist()
    expected = torch.full_like(scratch.positions, 2**31 - 1).cpu()
    list_candidates(scratch.keys.cpu(), i.seq_lens.cpu(), positions=expected)
    expect(torch.equal(expected, scratch.positions.cpu()), f"{what}: candidates are not the best keys")
    for row in range(0, len(lens), -(-len(lens) // rows)):
        name, length = f"{what} row {row} len {lens[row]}", lens[row]
        q, gates = i.index_q[row].float(), i.head_gates[row]
        if length > policy.candidates:
            pages = i.page_table[row, : length // PAGE - 1].long()
            columns = (q, gates)
            if scratch.columns is not None and policy.heads is not None:
                means = stats.means[pages].float()[None]
                complete = torch.tensor([[len(pages)]], device="cuda")
                s = reference.block_statistics(q[None, None], gates[None, None], means, complete, policy.router)
                columns = (scratch.columns.queries[row].float(), scratch.columns.gates[row])
                worst = torch.tensor([min(s.heads[0, 0, ((q == c).all(1))].max() for c in columns[0][: policy.heads])])
                limit = s.heads[0, 0].sort(descending=True).values[policy.heads - 1].cpu()
                expect(worst >= limit * (1 - 1e-3), f"{name}: routed head {worst} is under {limit}")
                if policy.residual:
                    ids = (q[:, None] == columns[0][None, : policy.heads]).all(-1).any(1).nonzero().view(1, 1, -1)
                    query, scale = reference.residual_query(q[None, None], gates[None, None], ids, s.positive)
                    truth, own = query[0, 0] * scale[0, 0], columns[0][-1] * columns[1][-1]
                    error = (truth - own).abs().max() / truth.abs().max()
                    expect(error < 0.05, f"{name}: residual is off by {float(error):.3f}")
            keys = reference.sketched_keys(*unpack(stats.sketches[pages], call.bits), stats.means[pages], call.bits)
            products = keys.flatten(0, 1) @ columns[0].T
            products[:, : products.shape[1] - policy.residual].relu_()
            cheap = products @ columns[1] / 512
            own = scratch.keys[row, : len(cheap)].to(torch.int32)
            slack = TOLERANCE * cheap.abs().max()
            bad = (own < score_keys(cheap - slack)) | (own > score_keys(cheap + slack))
            expect(not bad.any(), f"{name}: {int(bad.sum())} of {len(bad)} cheap scores are off")
        count = min(length, policy.candidates)
        candidates = scratch.positions[row, :count].long()
        page = i.page_table[row, candidates // PAGE].long()
        keys = reference.dequantize_pages(call.pool.pages[page.unique()])
        order = torch.zeros(len(call.pool.pages), dtype=torch.long, device="cuda")
        order[page.unique()] = torch.arange(len(keys), device="cuda")
        ranked = gates @ torch.relu(q @ keys[order[page], candidates % PAGE].T)
        taken = call.positions[row, : min(TOPK, length)].long()
        expect(
            (call.positions[row, len(taken) :] == -1).all() and (call.out[row, len(taken) :] == -1).all(),
            f"{name}: padding",
        )
        expect((taken.diff() > 0).all() and torch.isin(taken, candidates).all(), f"{name}: not of the candidates")
        slots = i.page_table[row, taken // PAGE] * PAGE + taken % PAGE
        expect(torch.equal(slots, call.out[row, : len(taken)]), f"{name}: slots name other pages")
        chosen = torch.isin(candidates, taken)
        if length > TOPK:
            gap = ranked[~chosen].max() - ranked[chosen].min()
            expect(gap <= TOLERANCE * ranked.abs().max(), f"{name}: left out one better by {float(gap):.3g}")
    first = call.out.clone()
    for _ in range(10):
        call.out.fill_(-7)
        call.whole()
        expect(torch.equal(call.out, first), f"{what}: differs between repeats")


def check_graph(pool: Pool) -> None:
    """One capture; lengths and page tables change in place; each replay equals an eager call."""
    policy = SketchPolicy(7, "peak", True, 8192)
    call = Call.of(pool, 2, random_inputs([128 * KIB] * 16, 64, 3), policy, check=True)
    call.whole()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.whole()
    for seed in range(4):
        torch.manual_seed(seed)
        lens = torch.randint(0, 128 * KIB, (16,)).tolist()
        lens[:7] = [0, 1, 64, 2048 + seed, 8192 + seed, 8191 + seed, 9000]
        fresh = random_inputs(lens, 64, 10 + seed)
        for name in ("index_q", "head_gates", "page_table", "seq_lens"):
            getattr(call.inputs, name).copy_(getattr(fresh, name))
        graph.replay()
        torch.cuda.synchronize()
        eager = Call.of(pool, 2, fresh, policy, check=True)
        eager.whole()
        expect(torch.equal(eager.out, call.out), f"graph replay {seed} differs from an eager call")


def check_all(pool: Pool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    check_quantiser(pool.pages[1:])
    edges = [0, 1, 63, 64, 65, 127, 128, 2047, 2048, 2049, 4095, 4096, 4097, 4224, 8192]
    routed = SketchPolicy(7, "peak", True, 4096)
    for bits in (1, 2):
        for heads in (64, 32):
            check(
                Call.of(pool, bits, random_inputs(edges, heads, 1), routed, check=True),
                f"{bits} bits H={heads} edges",
                99,
            )
            for rows, top in ((1, 128 * KIB), (4, 32 * KIB), (16, 64 * KIB), (64, 128 * KIB)):
                lens = [top - 37 * row for row in range(rows)]
                policy = replace(routed, candidates=8192)
                what = f"{bits} bits H={heads} R={rows} L={top}"
                check(Call.of(pool, bits, random_inputs(lens, heads, 2), policy, check=True), what)
    check(
        Call.of(pool, 2, random_inputs([40 * KIB] * 3, 64, 5), SketchPolicy(8, "mean", False, 4096), check=True), "mean"
    )
    check_graph(pool)


def stock_call(pool: Pool, inputs: Inputs) -> Callable[[], object] | None:
    try:
        from sglang_misa.bench import stock

        table = torch.where(inputs.page_table < len(pool.pages), inputs.page_table, 0)
        call = stock.decode(inputs.index_q, inputs.head_gates, pool.pages, table, inputs.seq_lens, TOPK)
        call()
        return call
    except ImportError as error:
        print(f"stock does not import here: {error}", flush=True)
        return None


def hisa_call(pool: Pool, inputs: Inputs) -> Callable[[], object]:
    rows, width = inputs.page_table.shape
    scratch = DecodeScratch.allocate(rows, width, 64, 128, torch.device("cuda"))
    out = torch.empty(rows, TOPK, dtype=torch.int32, device="cuda")
    return lambda: decode_topk(
        inputs.index_q, inputs.head_gates, pool.pages, pool.stats[2].means, inputs.page_table, inputs.seq_lens,
        block_size=128, scratch=scratch, out=out,
    )  # fmt: skip


def time_case(
    name: str, pool: Pool, sets: list[Inputs], policy: SketchPolicy, with_stock: bool
) -> list[dict[str, Any]]:
    """One line for each number of bits: stages, whole, beside stock and HISA."""
    rows, heads, _ = sets[0].index_q.shape
    length = int(sets[0].seq_lens.max())
    (hisa,) = graph_us([[hisa_call(pool, one) for one in sets]], REPLAYS)
    stock = None
    if with_stock:
        kinds = [stock_call(pool, one) for one in sets[: max(2, min(len(sets), int(8e9 // (rows * length * 4))))]]
        (stock,) = graph_us([[kind for kind in kinds if kind is not None]], REPLAYS)
    lines = []
    for bits in (1, 2):
        calls = [Call.of(pool, bits, one, policy) for one in sets]
        for call in calls:
            call.whole()
        line: dict[str, Any] = {"case": name, "heads": heads, "rows": rows, "length": length, "bits": bits}
        for stage in STAGES:
            (line[stage],) = graph_us([[getattr(call, stage) for call in calls]], REPLAYS)
        (line["whole"],) = graph_us([[call.whole for call in calls]], REPLAYS)
        line["floor"] = rows * length * (16 * bits + 2 + 4) / BANDWIDTH * 1e6
        line["stock"], line["hisa"] = stock, hisa
        lines.append(line)
        print(row_of(line), flush=True)
    return lines


HEADER = (
    "case     H batch     L b | " + " ".join(f"{s:>7}" for s in STAGES) + " |  whole  floor |  stock   hisa | x stock"
)


def row_of(line: dict[str, Any]) -> str:
    stock = line["stock"]
    ratio = f"{stock / line['whole']:7.2f}" if stock else "      -"
    return (
        f"{line['case']:7} {line['heads']:3} {line['rows']:5} {line['length'] // KIB:4}K {line['bits']} | "
        + " ".join(f"{line[stage]:7.1f}" for stage in STAGES)
        + f" | {line['whole']:6.1f} {line['floor']:6.1f} | {stock or 0:6.1f} {line['hisa']:6.1f} | {ratio}"
    )


def trained_case(path: str, policy: SketchPolicy, with_stock: bool) -> list[dict[str, Any]]:
    """64 rows of trained queries, each over its own copy of the pages; recall of DSA's set among the candidates."""
    from safetensors.torch import load_file

    t = {name: value.cuda() for name, value in load_file(path).items()}
    n = len(t["index_k"]) // PAGE
    pages = torch.cat([t["index_k"].view(torch.uint8).view(n, -1), t["k_scale"].view(n, PAGE).view(torch.uint8)], 1)
    pool = Pool.of(pages.repeat(64, 1))
    table = (torch.arange(64, device="cuda").view(-1, 1) * n + torch.arange(n, device="cuda")).int()
    table = torch.cat([table, table.new_full((64, TABLE_WIDTH - n), 2**31 - 1)], 1)
    inputs = Inputs(t["index_q"], t["head_gates"], table, t["positions"] + 1)
    keys = reference.dequantize_pages(pages).flatten(0, 1)
    for bits in (1, 2):
        call = Call.of(pool, bits, inputs, policy, check=True)
        check(call, f"{path} {bits} bits")
        assert call.positions is not None
        found, kept = [], []
        for row in range(64):
            seen = keys[: int(inputs.seq_lens[row])]
            best = (inputs.head_gates[row] @ torch.relu(inputs.index_q[row].float() @ seen.T)).topk(TOPK).indices
            found.append(torch.isin(best, call.scratch.positions[row].long()).float().mean())
            kept.append(torch.isin(best, call.positions[row].long()).float().mean())
        in_list, selected = torch.stack(found), torch.stack(kept)
        print(
            f"{Path(path).stem} {bits} bits: {in_list.mean():.4f} of DSA's set in {policy.candidates}, "
            f"{selected.mean():.4f} selected, worst row {selected.min():.4f}",
            flush=True,
        )
    full = replace(inputs, seq_lens=torch.arange(64, device="cuda", dtype=torch.int32) * -3 + n * PAGE)
    return time_case("trained", pool, [full], policy, with_stock)


def build_all() -> None:
    """Every CUDA source this needs, at once."""
    wanted = [
        'build("sm90/topk_kept.cu")',
        'build("sm90/sketch_candidates.cu")',
        'build("sm90/sketch_scan.cu", MISA_SKETCH_BITS=1, MISA_COLUMN_TILES=1)',
        'build("sm90/sketch_scan.cu", MISA_SKETCH_BITS=2, MISA_COLUMN_TILES=1)',
    ]
    code = "from sglang_misa.kernels.build import build; "
    running = [subprocess.Popen([sys.executable, "-c", code + one]) for one in wanted]
    if any(one.wait() for one in running):
        raise SystemExit("a CUDA source did not build")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="check, then time four cases")
    parser.add_argument("--candidates", type=int, default=8192)
    parser.add_argument("trained", nargs="*", help="safetensors files of trained index tensors")
    arguments = parser.parse_args()
    began = time.time()
    os.environ["PYTHONPATH"] = f"{Path(__file__).resolve().parents[1]}:{os.environ.get('PYTHONPATH', '')}"
    build_all()
    print(f"built ({time.time() - began:.0f} s)", flush=True)
    pool = Pool.of(random_pages(POOL_PAGES))
    policy = SketchPolicy(7, "peak", True, arguments.candidates)
    try:
        check_all(pool)
        print(f"correct ({time.time() - began:.0f} s)", flush=True)
        with_stock = stock_call(pool, random_inputs([32 * KIB], 64, 0)) is not None
        lines: list[dict[str, Any]] = []
        print(HEADER)
        cases = [(64, b, n) for b in (1, 4, 16, 64) for n in (32, 64, 128)] + [
            (64, 64, 256),
            (32, 1, 128),
            (32, 64, 128),
        ]
        if arguments.quick:
            cases = [(64, 1, 128), (64, 16, 128), (64, 64, 128), (64, 64, 32)]
        for heads, batch, length in cases:
            width = max(TABLE_WIDTH, length * KIB // PAGE)
            count = max(1, min(16, POOL_PAGES // (batch * length * KIB // PAGE)))
            lens = [length * KIB - 3 * row for row in range(batch)]
            sets = [random_inputs(lens, heads, seed, width) for seed in range(max(2, count))]
            lines += time_case("random", pool, sets, policy, with_stock)
        del pool
        for path in arguments.trained:
            lines += trained_case(path, policy, with_stock)
    except Wrong as error:
        print(f"WRONG, nothing timed after it: {error}")
        return 1
    if os.environ.get("OUT"):
        Path(os.environ["OUT"], "sketch.json").write_text(json.dumps(lines, indent=1))
    print(f"\n{torch.cuda.get_device_name()}, C = {policy.candidates}, {time.time() - began:.0f} s\n{HEADER}")
    for line in lines:
        print(row_of(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
