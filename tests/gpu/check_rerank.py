"""Checks, then times, MISA†'s and HISA's selection in prefill on one Hopper GPU.

    python tests/gpu/check_topk_reranked.py [--fast] [--no-check]

The exact checks use small integers and short fractions, whose scores no order of summation rounds: whole sets are
compared with a stable sort, ties included. The others compare with fp32 within a tolerance. HISA comes first, as it
needs nothing of the scorer; a part with a wrong result is not timed.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from sglang_misa import reference
from sglang_misa.kernels.build import Target, build
from sglang_misa.kernels.prefill import route, topk_blocks
from sglang_misa.kernels.prefill import topk_reranked as rerank
from sglang_misa.kernels.prefill import topk_routed as sr

DEVICE = "cuda"
NOTHING, IS_NAN, LOWEST = -1e302, -1e301, -1e300
TOLERANCE = 2e-3  # of a row's largest score
STAGES = {"sample": 1, "threshold": 2, "mark": 4, "rerank": 8, "redo": 16}
REPEATS = 7


def fp8(x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn)


def ints(values: object) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int32, device=DEVICE).contiguous()


def make(rows: int, keys: int, *, routed=8, heads=64, scales=64, windows=None, seed=0, exact=True) -> sr.Problem:
    """Exact: keys and queries of -1, 0, 1, gates of ±1 and 2, `scales` different scales in [1, 2).

    Otherwise clustered keys and heavy-tailed signed gates. Windows are those of one request, unless given.
    """
    g = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE, generator=g)

    def below(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, device=DEVICE, generator=g)

    if exact:
        k, q = below(3, keys, 128) - 1.0, below(3, rows, heads, 128) - 1.0
        scale = 1 + below(scales, keys) / 64.0
        gates = torch.tensor([1.0, 2.0, 1.0, -1.0], device=DEVICE)[below(4, rows, heads)]
    else:
        topics = normal(keys // 256 + 1, 128)
        k = normal(keys, 128) + topics.repeat_interleave(256, 0)[:keys]
        q = normal(rows, heads, 128) + 0.7 * topics[below(len(topics), rows)][:, None]
        scale = 0.01 * (0.5 + torch.rand(keys, device=DEVICE, generator=g))
        gates = torch.exp(1.5 * normal(rows, heads))
        gates = torch.where(torch.rand(rows, heads, device=DEVICE, generator=g) < 0.1, -gates, gates)
    ids = torch.rand(rows, heads, device=DEVICE, generator=g).argsort(1)[:, :routed].sort(1).values.int()
    if windows is None:
        ends = torch.arange(keys - rows + 1, keys + 1, device=DEVICE).clamp(min=min(1, keys))
        windows = torch.zeros_like(ends), ends
    return sr.Problem(fp8(q), gates.contiguous(), ids.contiguous(), fp8(k), scale.contiguous(), *map(ints, windows))


def requests(rows_keys: list[tuple[int, int]]) -> tuple[tuple[list[int], list[int]], int, int]:
    """Windows of several requests: (new rows, keys after them) each, causal, keys one behind the other."""
    ks: list[int] = []
    ke: list[int] = []
    at = 0
    for rows, keys in rows_keys:
        ks += [at] * rows
        ke += [at + keys - rows + 1 + t for t in range(rows)]
        at += keys
    return (ks, ke), len(ks), at


def scores(p: sr.Problem, row: int, heads: Tensor | None) -> Tensor:
    """Scores fp64 [S] of one row over `heads` (None: all); NOTHING outside its window, numbers for NaN and -inf."""
    ids = torch.arange(p.head_gates.shape[1], device=DEVICE) if heads is None else heads.long()
    x = torch.relu(p.index_q[row, ids].float() @ p.index_k.float().T)
    score = (p.head_gates[row, ids, None] * x).sum(0) * p.k_scale
    position = torch.arange(p.keys, device=DEVICE)
    inside = (position >= p.ks[row]) & (position < p.ke[row])
    ranked = (score.double() + 0.0).nan_to_num(nan=IS_NAN, neginf=LOWEST, posinf=-LOWEST)
    return ranked.masked_fill(~inside, NOTHING)


def best(score: Tensor, count: int) -> Tensor:
    """Sorted ids of the `count` best of [S] or all there are: ties to the smaller."""
    order = score.sort(descending=True, stable=True).indices[: min(count, int((score > NOTHING).sum()))]
    return order.sort().values


def exact_problem(p: sr.Problem, out: Tensor, k: int, allowed: Callable[[int], Tensor]) -> str | None:
    """Compares all rows of positions `out` with the best k of the ids that `allowed` gives for a row."""
    for row in range(p.rows):
        ids = allowed(row)
        full = torch.full((p.keys,), NOTHING, dtype=torch.float64, device=DEVICE)
        full[ids] = scores(p, row, None)[ids]
        want, got = best(full, k) - p.ks[row], out[row][out[row] >= 0].long().sort().values
        if (out[row] >= 0).sum() != len(want) or (out[row, len(want) :] != -1).any():
            return f"row {row}: expected {len(want)} positions and -1 behind them, got {int((out[row] >= 0).sum())}"
        if not torch.equal(got, want):
            missing = want[~torch.isin(want, got)]
            return f"row {row} of {p.rows}: {len(missing)} positions missing, the first {missing[:4].tolist()}"
    return None


def rerank_run(p: sr.Problem, candidates: int, k: int, budget=sr.SCRATCH_BYTES, **target: Tensor):
    out = torch.full((p.rows, k), -7, dtype=torch.int32, device=DEVICE)
    call = rerank.Reranked(p, candidates, Target(out, **target), budget)
    call.scratch.fill_(0xFF)
    call.run()
    return out, call


def rerank_problem(p: sr.Problem, candidates: int, k: int, **target: Tensor) -> tuple[str | None, int]:
    out, call = rerank_run(p, candidates, k, **target)
    problem = exact_problem(p, out, k, lambda row: best(scores(p, row, p.head_ids[row]), candidates))
    return problem, call.redone()


def near_problem(p: sr.Problem, out: Tensor, candidates: int, k: int, rows: list[int]) -> str | None:
    """Compares rows with fp32 where a score may round either way: the cut and the k-th best have a tolerance."""
    for row in rows:
        routed, full = scores(p, row, p.head_ids[row]), scores(p, row, None)
        inside = full > NOTHING
        length = int(inside.sum())
        chosen = out[row][out[row] >= 0].long() + p.ks[row]
        if len(chosen) != min(k, length) or chosen.unique().numel() != len(chosen) or not inside[chosen].all():
            return f"row {row}: wrong count, a position twice, or out of the window"
        if length <= k:
            continue
        slack, full_slack = (TOLERANCE * s[inside].abs().max() for s in (routed, full))
        cut = routed.topk(min(candidates, length)).values[-1]
        surely, maybe = inside & (routed > cut + slack), inside & (routed >= cut - slack)
        if length <= candidates:
            surely = maybe = inside
        if not maybe[chosen].all():
            return f"row {row}: {int((~maybe[chosen]).sum())} chosen keys are clearly no candidates"
        lower = full.masked_fill(~surely, NOTHING).topk(k).values[-1]
        upper = full.masked_fill(~maybe, NOTHING).topk(k).values[-1]
        if (full[chosen] < lower - full_slack).any():
            return f"row {row}: a chosen key is clearly below the k-th best"
        missed = surely & (full > upper + full_slack)
        missed[chosen] = False
        if missed.any():
            return f"row {row}: {int(missed.sum())} keys clearly among the best k are missing"
    return None


def blocks_run(p: sr.Problem, block_scores: Tensor, blocks: int, size: int, k: int, **target: Tensor) -> Tensor:
    tensors = (p.index_q, p.head_gates, p.index_k, p.k_scale, block_scores, p.ks, p.ke)
    return topk_blocks.topk_blocks(*tensors, blocks, size, k, **target)


def blocks_problem(p: sr.Problem, block_scores: Tensor, blocks: int, size: int, k: int) -> str | None:
    out = blocks_run(p, block_scores, blocks, size, k)
    complete = (p.ke - p.ks).clamp(min=0) // size
    kept = reference.keep_blocks(block_scores[None], complete[None], blocks)[0]

    def allowed(row: int) -> Tensor:
        position = torch.arange(int(p.ke[row] - p.ks[row]), device=DEVICE)
        tail = position >= complete[row] * size
        return position[tail | kept[row, (position // size).clamp(max=kept.shape[1] - 1)]] + p.ks[row]

    return exact_problem(p, out, k, allowed)


def hostile() -> Iterator[tuple[str, sr.Problem]]:
    p = make(40, 7000, seed=5)
    yield "many ties", make(40, 7000, scales=1, seed=6)
    yield (
        "all equal",
        replace(p, index_k=fp8(torch.ones(p.index_k.shape, device=DEVICE)), k_scale=torch.ones_like(p.k_scale)),
    )
    yield "all zero", replace(p, index_q=fp8(torch.zeros(p.index_q.shape, device=DEVICE)))
    outlier = p.k_scale.clone()
    outlier[[20, 4321]] = 2.0**40
    yield "outliers", replace(p, k_scale=outlier)
    rare = p.k_scale.clone()
    rare[torch.randperm(7000, device=DEVICE)[:6500]] = 0
    yield "mostly zero", replace(p, k_scale=rare)
    for name, factor in (("high", 64.0), ("low", 2.0**-6)):
        period = p.k_scale.clone()
        period[4::8] *= factor
        yield f"defeats the sample ({name})", replace(p, k_scale=period)
    for name, value in (("NaN gates", torch.nan), ("inf gates", torch.inf), ("-inf gates", -torch.inf)):
        gates = p.head_gates.clone()
        gates[::3] = value
        gates[1::3, ::2] = value
        yield name, replace(p, head_gates=gates)
    gates = p.head_gates.clone()
    gates.scatter_(1, (p.head_ids[:, :1].long() + 1) % 64, torch.nan)
    yield "NaN in one gate", replace(p, head_gates=gates)
    scale = p.k_scale.clone()
    scale[::2] = torch.nan
    yield "NaN keys", replace(p, k_scale=scale)
    scale[1::2] = -torch.inf
    yield "NaN and -inf keys", replace(p, k_scale=scale.clone())
    yield "negative", replace(p, head_gates=-p.head_gates.abs())


class Notes:
    """Problems of one part, said as they are found."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.began = time.time()

    def add(self, name: str, problem: str | None) -> None:
        if problem:
            self.problems.append(f"{name}: {problem}")
            print("  " + self.problems[-1], flush=True)

    def done(self, what: str) -> None:
        torch.cuda.synchronize()
        print(f"  {what}: after {time.time() - self.began:.0f} s, {len(self.problems)} problems", flush=True)


def check_blocks() -> list[str]:
    notes = Notes()
    g = torch.Generator(DEVICE).manual_seed(1)
    for rows, keys, blocks, size, k, heads in (
        (5, 100, 4, 64, 128, 64),
        (70, 3000, 8, 128, 512, 64),
        (33, 9000, 16, 256, 2048, 64),
        (20, 20000, 64, 128, 2048, 64),
        (20, 20000, 64, 128, 2048, 32),
        (6, 140000, 128, 128, 2048, 64),
        (9, 9000, 2, 1024, 2048, 64),
        (9, 5000, 1, 2048, 2048, 64),
    ):
        p = make(rows, keys, heads=heads, seed=keys)
        block_scores = torch.randn(rows, keys // size + 1, device=DEVICE, generator=g)
        block_scores[::3] = block_scores[::3].round()
        block_scores[1::4, ::3] = torch.nan
        block_scores[2::5, ::2] = -torch.inf
        notes.add(
            f"blocks {rows}×{keys}, {blocks} of {size}, H={heads}", blocks_problem(p, block_scores, blocks, size, k)
        )
    windows, rows, keys = requests([(3, 3), (20, 9000), (10, 70000), (20, 2100)])
    p = make(rows, keys, windows=windows, seed=4)
    block_scores = torch.randn(rows, 600, device=DEVICE, generator=g)
    notes.add("blocks, requests", blocks_problem(p, block_scores, 20, 128, 2048))
    notes.done("blocks")
    return notes.problems


def check_rerank(fast: bool) -> list[str]:
    notes = Notes()
    for rows, keys, candidates, k, heads, routed in (
        (1, 1, 512, 128, 64, 8),
        (3, 700, 512, 128, 64, 8),
        (64, 3000, 1024, 256, 64, 8),
        (65, 9000, 4096, 2048, 64, 8),
        (130, 20000, 8192, 2048, 64, 8),
        (30, 8300, 8192, 2048, 64, 8),
        (9, 65540, 8192, 2048, 64, 8),
        (17, 70000, 8192, 2048, 64, 8),
        (17, 70000, 16384, 2048, 64, 8),
        (9, 140000, 8192, 2048, 64, 8),
        (40, 20000, 2048, 2048, 64, 8),
        (40, 20000, 8192, 2048, 64, 4),
        (40, 20000, 8192, 2048, 64, 16),
        (40, 20000, 8192, 2048, 64, 32),
        (40, 20000, 8192, 2048, 32, 8),
    ):
        p = make(rows, keys, heads=heads, routed=routed, seed=rows + keys)
        problem, redone = rerank_problem(p, candidates, k)
        notes.add(f"rerank {rows}×{keys}, C={candidates}, H={heads}, h={routed} ({redone} redone)", problem)
    notes.done("rerank")
    for name, p in hostile():
        problem, redone = rerank_problem(p, 2048, 512)
        notes.add(f"hostile, {name} ({redone} of {p.rows} redone)", problem)
    notes.done("hostile")
    sizes = [(1, 1), (5, 40), (20, 3000), (40, 20000), (3, 3), (30, 8192), (31, 8193), (4, 20000), (20, 8000)]
    windows, rows, keys = requests(sizes)
    ks, ke = windows
    ks[-3:], ke[-3:] = [0] * 3, [0] * 3  # rows beyond the real tokens
    p = make(rows, keys, windows=(ks, ke), seed=8)
    problem, redone = rerank_problem(p, 8192, 2048)
    notes.add(f"requests ({redone} redone)", problem)
    plain, _ = rerank_run(p, 8192, 2048)
    offsets = ints(torch.arange(rows, device=DEVICE) * 10)
    shifted, _ = rerank_run(p, 8192, 2048, offsets=offsets)
    want = torch.where(plain >= 0, plain + offsets[:, None], -1)
    notes.add("offsets", None if torch.equal(shifted.sort(1).values, want.sort(1).values) else "not position + offset")
    table = torch.randperm(2 * 320, device=DEVICE).int().view(2, 320)[:, :313]  # rows lie apart
    batch = ints([t % 2 for t in range(rows)])
    paged, _ = rerank_run(p, 8192, 2048, page_table=table, row_batch=batch)
    position = plain.clamp(min=0).long()
    want = torch.where(plain >= 0, table[batch.long()].gather(1, position // 64) * 64 + position % 64, -1)
    notes.add(
        "page table", None if torch.equal(paged.sort(1).values, want.sort(1).values) else "not the position's slot"
    )
    few, call = rerank_run(p, 8192, 2048, budget=2 << 20)
    notes.add(
        f"passes of {call.plan.rows} rows", None if torch.equal(few.sort(1).values, plain.sort(1).values) else "differ"
    )
    p = make(300, 50000, seed=23, exact=False)
    sets = {hash(rerank_run(p, 8192, 2048)[0].sort(1).values.cpu().numpy().tobytes()) for _ in range(20)}
    notes.add("repeats", None if len(sets) == 1 else f"expected one set in 20 runs, got {len(sets)}")
    out, call = rerank_run(p, 8192, 2048)
    notes.add(f"300×50000 ({call.redone()} redone)", near_problem(p, out, 8192, 2048, list(range(0, 300, 7))))
    notes.done("outputs and repeats")
    if not fast:
        p = make(8192, 131072, seed=24, exact=False)
        out, call = rerank_run(p, 8192, 2048)
        rows = list(range(0, 8192, 331))
        notes.add(f"8192×131072 ({call.redone()} redone)", near_problem(p, out, 8192, 2048, rows))
        notes.done("full size")
    return notes.problems


_flush: list[Tensor] = []


def elapsed_us(calls: list[Callable[[], object]]) -> list[float]:
    """Median µs of each of `calls`, made one after another behind a flush of the L2 cache."""
    if not _flush:
        _flush.append(torch.empty(512 << 20, dtype=torch.uint8, device=DEVICE))
    samples = []
    for _ in range(REPEATS):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
        _flush[0].zero_()
        marks[0].record()
        for call, mark in zip(calls, marks[1:], strict=True):
            call()
            mark.record()
        torch.cuda.synchronize()
        samples.append([a.elapsed_time(b) * 1e3 for a, b in itertools.pairwise(marks)])
    return [statistics.median(column) for column in zip(*samples, strict=True)]


def time_rerank(rows: int, keys: int, candidates: int, heads: int, *, exact: bool, routed=8) -> None:
    p = make(rows, keys, heads=heads, routed=routed, exact=exact, seed=1)
    call = rerank.Reranked(p, candidates, Target(torch.empty(rows, 2048, dtype=torch.int32, device=DEVICE)))
    assert call.plan.rows >= rows, "stages can be timed in one pass only"
    call.run()
    stages = elapsed_us([lambda s=stage: call.run(s) for stage in STAGES.values()])
    (total,) = elapsed_us([call.run])
    began = time.perf_counter()
    call.run()
    host = (time.perf_counter() - began) * 1e6
    torch.cuda.synchronize()
    parts = " ".join(f"{name} {us:5.0f}" for name, us in zip(STAGES, stages, strict=True))
    name, plan = f"rerank {rows}×{keys} C={candidates} H={heads} h={routed}{' iid' if exact else ''}", call.plan
    print(f"{name}: {total:5.0f} us = {parts}; host {host:.0f}", flush=True)
    print(f"  {call.redone()} redone; stride {plan.stride}, rank {plan.rank}, room {plan.room}")


def time_blocks(rows: int, keys: int, blocks: int, size: int, heads: int) -> None:
    p = make(rows, keys, heads=heads, exact=False, seed=1)
    pooled = torch.randn(1, keys // size, 128, device=DEVICE).bfloat16()
    only, lens = torch.zeros_like(p.ke), p.ke
    table = torch.randperm(keys // 64, device=DEVICE).int()[None]
    out = torch.empty(rows, 2048, dtype=torch.int32, device=DEVICE)
    found: list[Tensor] = []

    def score() -> None:
        found[:] = [route.block_scores(p.index_q, p.head_gates, pooled, only, lens, size)]

    def select() -> None:
        blocks_run(p, found[0], blocks, size, 2048, out=out, page_table=table, row_batch=only)

    score()
    select()
    score_us, select_us = elapsed_us([score, select])
    name = f"blocks {rows}×{keys} {blocks}×{size} H={heads}"
    print(f"{name}: block_scores {score_us:.0f} us, topk_blocks {select_us:.0f} us", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fast", action="store_true", help="leave out the full-size check")
    parser.add_argument("--no-check", action="store_true", help="time only (for a profiler)")
    args = parser.parse_args()
    began = time.time()
    faulthandler.dump_traceback_later(150, exit=True)  # a kernel that waits for ever leaves a trace
    os.environ["TVM_FFI_CUDA_ARCH_LIST"] = "9.0a"  # builds run side by side
    with ThreadPoolExecutor(8) as pool:
        shapes = [(8, 64), (8, 32)] if args.no_check else [(8, 64), (8, 32), (4, 64), (16, 64), (32, 64)]
        builds = [pool.submit(rerank.module, *shape) for shape in shapes]
        builds += [pool.submit(build, "topk_blocks.cu", MISA_INDEX_HEADS=heads) for heads in topk_blocks.INDEX_HEADS]
        for built in builds:
            built.result()
    print(f"{torch.cuda.get_device_name()}: built {len(builds)} modules in {time.time() - began:.0f} s", flush=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    problems = []
    if args.no_check or not (wrong := check_blocks()):
        for keys in (131072, 32768):
            time_blocks(8192, keys, 64, 128, 64)
        time_blocks(8192, 131072, 64, 128, 32)
    else:
        problems += wrong
    if args.no_check or not (wrong := check_rerank(args.fast)):
        for keys in (131072, 32768):
            time_rerank(8192, keys, 8192, 64, exact=False)
        time_rerank(8192, 131072, 8192, 64, exact=True)
        time_rerank(8192, 65536, 8192, 64, exact=False)
        time_rerank(8192, 131072, 4096, 64, exact=False)
        time_rerank(8192, 131072, 8192, 32, exact=False)
    else:
        problems += wrong
    print(f"{len(problems)} problems; {time.time() - began:.0f} s", flush=True)
    return len(problems) > 0


if __name__ == "__main__":
    sys.exit(main())
