"""Builds, checks and times the ragged scorer and its exact top k on one Hopper GPU.

`PYTHONPATH=. python3 tests/gpu/check_prefill.py`. Correctness first; a wrong result leaves no timing. Scores are
compared with fp32 PyTorch, selections with torch.topk of the kernel's own scores (bit for bit, as multisets) and,
within its tolerance, of the fp32 reference. Writes prefill.json to $OUT.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from sglang_misa.bench.timing import event_us, kernel_us
from sglang_misa.kernels.build import Target
from sglang_misa.kernels.prefill import topk_routed as sr

DEVICE = "cuda"


def fp8(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float8_e4m3fn)


def make(rows, keys, heads=8, all_heads=64, *, windows=None, seed=0, weights="heavy", structure=True) -> sr.Problem:
    """Random problem: clustered keys, heavy-tailed signed weights, causal windows of one request unless given."""
    g = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, device=DEVICE, generator=g)

    k = normal(keys, 128)
    q = normal(rows, all_heads, 128)
    if structure and keys >= 64:  # topics a few hundred tokens long, and queries that lean towards some of them
        topics = normal(keys // 256 + 1, 128)
        k += topics.repeat_interleave(256, 0)[:keys]
        q += 0.7 * topics[torch.randint(len(topics), (rows,), device=DEVICE, generator=g)][:, None]
    scale = 0.01 * (0.5 + torch.rand(keys, device=DEVICE, generator=g))
    w = (
        torch.exp(1.5 * normal(rows, all_heads))
        if weights == "heavy"
        else torch.rand(rows, all_heads, device=DEVICE, generator=g)
    )
    if weights == "heavy":
        w = torch.where(torch.rand(rows, all_heads, device=DEVICE, generator=g) < 0.2, -w, w)
    ids = torch.rand(rows, all_heads, device=DEVICE, generator=g).argsort(1)[:, :heads].int().contiguous()
    if windows is None:
        ends = torch.arange(keys - rows + 1, keys + 1, device=DEVICE).clamp(min=min(1, keys))
        windows = torch.zeros_like(ends), ends
    ks, ke = (torch.as_tensor(x, device=DEVICE).int().contiguous() for x in windows)
    return sr.Problem(fp8(q), w.contiguous(), ids, fp8(k), scale.contiguous(), ks, ke)


def reference(p: sr.Problem, rows: slice) -> torch.Tensor:
    """fp32 scores [rows, S], -inf outside the windows."""
    k, ids = p.index_k.float(), p.head_ids[rows].long()
    q = torch.gather(p.index_q[rows].float(), 1, ids[..., None].expand(-1, -1, 128))
    w = torch.gather(p.head_gates[rows], 1, ids)
    out = torch.zeros(len(ids), p.keys, device=DEVICE)
    for j in range(ids.shape[1]):
        out += w[:, j, None] * torch.relu(q[:, j] @ k.T)
    out *= p.k_scale
    column = torch.arange(p.keys, device=DEVICE)
    return out.masked_fill((column < p.ks[rows, None]) | (column >= p.ke[rows, None]), -torch.inf)


def logits_of(p: sr.Problem, rows: slice) -> torch.Tensor:
    lo, hi, _ = rows.indices(p.rows)
    return sr.routed_logits(
        p.index_q, p.head_gates, p.head_ids, p.index_k, p.k_scale, p.ks, p.ke, first=lo, rows=hi - lo
    )


def logits_problem(p: sr.Problem, rows: slice, *, finite=True) -> str | None:
    got, want = logits_of(p, rows), reference(p, rows)
    inside = want > -torch.inf
    if not finite:
        return None
    if not torch.isfinite(got[inside]).all() or (got[~inside] != -torch.inf).any():
        return "a score is not finite or lies outside its window"
    error = (got[inside] - want[inside]).norm() / want[inside].norm().clamp(min=1e-20)
    return None if error < 2e-3 else f"scores differ from fp32 by {error:.2e}"


def run(p: sr.Problem, k: int, longest: int | None = None, **target) -> tuple[torch.Tensor, sr.Ragged]:
    out = torch.full((p.rows, k), -7, dtype=torch.int32, device=DEVICE)
    ragged = sr.Ragged(p, Target(out, **target), longest=longest)
    ragged.scratch.fill_(0xFF)  # NaN, and counts of -1
    ragged.run()
    return out, ragged


def selection_problem(p: sr.Problem, out: torch.Tensor, k: int, *, against_fp32=True) -> str | None:
    """Compares a selection of positions with torch.topk, 512 rows at a time."""
    torch.cuda.synchronize()
    for lo in range(0, p.rows, 512):
        rows = slice(lo, min(lo + 512, p.rows))
        lengths = (p.ke[rows].clamp(max=p.keys) - p.ks[rows].clamp(min=0)).clamp(min=0)
        chosen = out[rows].long()
        valid = chosen >= 0
        if (valid.sum(1) != lengths.clamp(max=k)).any() or (chosen < -1).any() or (chosen >= lengths[:, None]).any():
            return f"rows {lo}…: wrong count or position out of the window"
        if (~valid[:, :-1] & valid[:, 1:]).any():
            return f"rows {lo}…: a hole in the output"
        ordered = chosen.sort(1).values
        if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
            return f"rows {lo}…: a position twice"
        scores = logits_of(p, rows)
        column = torch.arange(p.keys, device=DEVICE)
        inside = (column >= p.ks[rows, None]) & (column < p.ke[rows, None])
        # Finite numbers only, in rank order: outside < NaN < -inf < numbers < inf.
        ranks = (
            scores.double()
            .clamp(-1e300, 1e300)
            .nan_to_num(nan=-1e301, neginf=-1e300, posinf=1e300)
            .masked_fill(~inside, -1e302)
        )
        width = min(k, p.keys)
        want = ranks.topk(width, 1).values
        absolute = (chosen + p.ks[rows, None]).clamp(0, p.keys - 1)
        got = ranks.gather(1, absolute).masked_fill(~valid, -1e302).sort(1, descending=True).values[:, :width]
        if not torch.equal(got, want):
            bad = (got != want).any(1).nonzero()[:4, 0] + lo
            places = int((got != want).sum())
            return f"rows {bad.tolist()}…: not the top {k} of the kernel's own scores ({places} places differ)"
        if against_fp32:
            ref = reference(p, rows)
            kth = ref.topk(width, 1).values[:, -1:]
            slack = 2e-3 * ref.masked_fill(~inside, 0).abs().amax(1, keepdim=True)
            low = (ref.gather(1, absolute) < kth - slack) & valid & (lengths[:, None] > k)
            if low.any():
                return f"rows {lo}…: {int(low.sum())} chosen keys are clearly below the fp32 cut"
    return None


def counted(ragged: sr.Ragged, rows: int) -> torch.Tensor:
    """Hits [rows, runs, buffers] of the last pass, whose rows these are; -1 where a buffer overflowed."""
    plan, base, block = ragged.plan, ragged.lists, sr.block_rows(ragged.problem.routed)

    def words(offset: int, count: int) -> torch.Tensor:
        return ragged.scratch[base + offset :][: 4 * count].view(torch.int32)

    table = words(plan.division_offset, -(-rows // block) + 2).long()
    share, before = table[0], table[1:]
    first = before[:-1] // share
    runs = torch.where(before[1:] > before[:-1], (before[1:] - 1) // share - first + 1, 0)
    assert int(runs.max()) <= plan.runs, "more runs than the plan has room for"
    first, runs = (x.repeat_interleave(block)[:rows, None] for x in (first, runs))
    run = torch.arange(max(int(runs.max()), 1), device=DEVICE)
    places = torch.arange(rows, device=DEVICE)[:, None] + (first + run) * block
    held = plan.rows + plan.workers * block
    counts = words(plan.counts_offset, 2 * held * plan.buffers).view(held, plan.buffers, 2)[..., 1]
    return counts[places.clamp(max=held - 1)].where((run < runs)[..., None], 0)


def stage_problems(p: sr.Problem, k: int) -> list[str]:
    """Each stage of one pass against PyTorch on the kernel's own scores; windows must start at 0."""
    ragged = sr.Ragged(p, Target(torch.empty(p.rows, k, dtype=torch.int32, device=DEVICE)))
    plan, problems = ragged.plan, []
    assert p.rows <= plan.rows, "one pass"
    base = ragged.lists
    thresholds = ragged.scratch[base:][: 4 * p.rows].view(torch.float32)
    sampled = ragged.scratch[base + plan.bulk_offset :][: 4 * p.rows * plan.sampled].view(torch.float32)
    ragged.scratch.fill_(0xFF)
    plain = logits_of(p, slice(0, p.rows))
    ragged.run(sr.SAMPLE_STAGE)
    want = plain[:, plan.stride // 2 :: plan.stride]
    got = sampled.view(p.rows, plan.sampled)[:, : want.shape[1]]
    wrong = ((got != want) & (want > -torch.inf)).sum().item()
    if wrong:
        problems.append(f"sample: {wrong} of {want.numel()} scores differ from the plain path")
    ragged.run(sr.THRESHOLD_STAGE)
    above = (want > thresholds[:, None]).sum(1)
    # The rank is met within 1/8; where the cut falls on many zero scores (ReLU makes them) they are left out.
    few = (above < plan.rank) & (thresholds != 0)
    if (few | (above > plan.rank + plan.rank // 8)).any():
        low, high = above.min().item(), above.max().item()
        problems.append(f"threshold: expected {plan.rank}… of the sample above it, got {low} to {high}")
    ragged.run(sr.COLLECT_STAGE)
    hits, rows = (plain > thresholds[:, None]).sum(1), counted(ragged, p.rows).flatten(1)
    if (rows < 0).any() or (rows.sum(1) != hits).any():
        worst = (rows.sum(1) - hits).abs().max().item()
        problems.append(f"collect: counts differ by up to {worst}; {(rows < 0).sum().item()} buffers overflowed")
    return problems


def requests(rows_keys: list[tuple[int, int]]):
    """Windows of several requests: (new rows, keys after them) each, causal, keys one behind the other."""
    ks, ke, at = [], [], 0
    for rows, keys in rows_keys:
        ks += [at] * rows
        ke += [at + keys - rows + 1 + t for t in range(rows)]
        at += keys
    return (torch.tensor(ks), torch.tensor(ke)), len(ks), at


def hostile():
    """(name, problem, whether scores are finite)."""
    rows, keys = 70, 6000

    def change(p, **fields):
        return sr.Problem(**{name: fields.get(name, getattr(p, name)) for name in p.__dataclass_fields__})

    p = make(rows, keys, seed=5)
    one = fp8(torch.ones(1, device=DEVICE))
    same = change(p, index_k=one.expand(keys, 128).contiguous(), k_scale=torch.full_like(p.k_scale, 0.5))
    yield "all equal", same, True
    yield "all zero", change(p, index_q=torch.zeros_like(p.index_q.view(torch.uint8))), True
    sorted_scale = torch.linspace(0.1, 1, keys, device=DEVICE)
    yield "ascending", change(same, k_scale=sorted_scale.contiguous()), True
    yield "descending", change(same, k_scale=sorted_scale.flip(0).contiguous()), True
    outlier = p.k_scale.clone()
    outlier[4321] = 1e9
    yield "outlier", change(p, k_scale=outlier), True
    rare = p.k_scale.clone()
    rare[torch.randperm(keys, device=DEVICE)[: keys - 500]] = 0
    yield "mostly zero", change(p, k_scale=rare), True
    period = p.k_scale.clone()
    period[4::8] *= 100  # the sampled keys, all far above the others
    yield "defeats the sample (high)", change(p, k_scale=period), True
    period = p.k_scale.clone()
    period[4::8] *= 0.01
    yield "defeats the sample (low)", change(p, k_scale=period), True
    comb = p.k_scale.clone()
    comb[0::64] *= 1000  # every hit in one private buffer
    yield "one buffer", change(make(rows, keys * 30, seed=5), k_scale=comb.repeat(30)), True
    for name, value in (("NaN gates", torch.nan), ("inf gates", torch.inf), ("-inf gates", -torch.inf)):
        gates = p.head_gates.clone()
        gates[::3] = value
        gates[1::3, ::2] = value
        yield name, change(p, head_gates=gates), False
    scale = p.k_scale.clone()
    scale[::2] = torch.nan
    yield "NaN keys", change(p, k_scale=scale), False
    scale[1::2] = -torch.inf
    yield "NaN and -inf keys", change(p, k_scale=scale.clone()), False


def check(fast: bool) -> list[str]:
    problems: list[str] = []

    def note(name: str, problem: str | None) -> None:
        if problem:
            problems.append(f"{name}: {problem}")

    sizes = [(r, s) for r in (1, 15, 16, 17, 130, 512) for s in (1, 63, 64, 65, 2047, 2048, 2049, 5000)] + [
        (1, 131072),
        (17, 131072),
        (512, 131072),
    ]
    for rows, keys in sizes:
        p = make(rows, keys, seed=rows * 7 + keys)
        wrong = logits_problem(p, slice(0, rows))
        if wrong:
            return [*problems, f"logits {rows}×{keys}: {wrong}"]  # nothing else can be right
        out, _ = run(p, 2048)
        note(f"top {rows}×{keys}", selection_problem(p, out, 2048))
        if rows * keys == 130 * 5000:
            problems.extend(stage_problems(p, 2048))
    problems.extend(stage_problems(make(500, 60000, seed=2), 2048))
    for heads in (4, 16, 32, 64):
        p = make(200, 9000, heads, seed=heads)
        note(f"logits h={heads}", logits_problem(p, slice(0, 200)))
        note(f"top h={heads}", selection_problem(p, run(p, 2048)[0], 2048))
        p = make(100, 131072, heads, seed=heads)
        note(f"top h={heads} of 128K", selection_problem(p, run(p, 2048)[0], 2048))
    p = make(100, 9000, 8, all_heads=32, seed=3)
    note("32 index heads", selection_problem(p, run(p, 2048)[0], 2048))
    for name, spec in {
        "requests": [(1, 1), (5, 40), (100, 3000), (40, 20000), (3, 3), (64, 2048), (61, 2049)],
        "1 beside 128K": [(1, 1), (30, 131072), (1, 1)],
        "the end of a long prompt beside short ones": [(32, 131072), (300, 2500), (300, 1500), (5, 3)],
    }.items():
        windows, rows, keys = requests(spec)
        p = make(rows, keys, windows=windows, seed=11)
        note(f"logits {name}", logits_problem(p, slice(0, rows)))
        note(name, selection_problem(p, run(p, 2048)[0], 2048))
        longest = int((p.ke - p.ks).max())
        note(f"{name}, {longest} keys at most", selection_problem(p, run(p, 2048, longest)[0], 2048))
    windows, rows, keys = requests([(50, 7000), (20, 3000)])
    ks, ke = windows
    ks[-5:], ke[-5:] = 0, 0  # rows beyond the real tokens
    p = make(rows, keys, windows=(ks, ke), seed=12)
    plain, _ = run(p, 2048)
    note("padding rows", selection_problem(p, plain, 2048))
    offsets = torch.arange(rows, device=DEVICE, dtype=torch.int32) * 10
    ragged, _ = run(p, 2048, offsets=offsets)
    if not torch.equal(ragged.sort(1).values, torch.where(plain >= 0, plain + offsets[:, None], -1).sort(1).values):
        problems.append("offsets: not position + offset")
    table = torch.randperm(2 * 110, device=DEVICE).int().view(2, 110)
    batch = torch.tensor([0] * 50 + [1] * 20, device=DEVICE, dtype=torch.int32)
    paged, _ = run(p, 2048, page_table=table, row_batch=batch)
    position = plain.clamp(min=0).long()
    want = torch.where(plain >= 0, table[batch.long()].gather(1, position // 64) * 64 + position % 64, -1)
    if not torch.equal(paged.sort(1).values, want.sort(1).values):
        problems.append("page table: not the slot of the position")
    for name, p, finite in hostile():
        out, ragged_run = run(p, 2048)
        note(
            f"hostile, {name} ({ragged_run.redone()} of {p.rows} redone)",
            selection_problem(p, out, 2048, against_fp32=finite and "equal" not in name),
        )
    p = make(150, 40000, seed=21)
    for k in (64, 512, 8192, 16384):
        note(f"k={k}", selection_problem(p, run(p, k)[0], k))
    p = make(700, 70000, seed=22)
    note("700×70000", selection_problem(p, run(p, 2048)[0], 2048))
    windows, rows, keys = requests([(50, 7000), (20, 30000), (100, 100)])
    p = make(rows, keys, windows=windows, seed=13)
    note("uneven requests", selection_problem(p, run(p, 2048)[0], 2048))
    p = make(300, 50000, seed=23)
    sets = {hash(run(p, 2048)[0].sort(1).values.cpu().numpy().tobytes()) for _ in range(20)}
    if len(sets) != 1:
        problems.append(f"repeats: expected one set in 20 runs, got {len(sets)}")
    if not fast:
        p = make(8192, 131072, seed=24)
        out, ragged_run = run(p, 2048)
        note(f"8192×131072 ({ragged_run.redone()} redone)", selection_problem(p, out, 2048))
    return problems


def time_stages(p: sr.Problem, k: int) -> dict[str, float]:
    """Milliseconds of a call and of its kernels, summed over passes; rows redone, a row's hits, passes."""
    ragged = sr.Ragged(p, Target(torch.empty(p.rows, k, dtype=torch.int32, device=DEVICE)))
    ragged.run()
    plan = ragged.plan
    last = p.rows - (p.rows - 1) // plan.rows * plan.rows
    return {
        "total": event_us(ragged.run) / 1e3,
        **{name: us / 1e3 for name, us in kernel_us(ragged.run).items()},
        "redone": ragged.redone(),
        "hits": counted(ragged, last).clamp(min=0).flatten(1).sum(1).float().mean().item(),
        "passes": -(-p.rows // plan.rows),
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fast", action="store_true", help="leave out the full-size check")
    parser.add_argument("--no-check", action="store_true", help="time only (for a profiler)")
    parser.add_argument("--first", action="store_true", help="time the first case alone")
    args = parser.parse_args()
    began = time.time()
    faulthandler.dump_traceback_later(150, exit=True)  # a kernel that waits for ever leaves a trace
    os.environ["TVM_FFI_CUDA_ARCH_LIST"] = "9.0a"  # builds run side by side
    with ThreadPoolExecutor(8) as pool:
        builds = [pool.submit(sr.module, heads) for heads in sr.ROUTED_HEADS]
        for built in builds:
            built.result()
    print(f"{torch.cuda.get_device_name()}: built {len(builds)} modules in {time.time() - began:.0f} s", flush=True)
    report: dict = {"device": torch.cuda.get_device_name(), "problems": [], "timings": {}}
    out = Path(os.environ["OUT"]) / "prefill.json" if "OUT" in os.environ else None
    if not args.no_check:
        report["problems"] = check(args.fast)
        print(
            f"checked by {time.time() - began:.0f} s: {len(report['problems'])} problems",
            *report["problems"],
            sep="\n  ",
            flush=True,
        )
    if not report["problems"]:
        cases = []
        for length in (131072, 65536, 32768):
            p = make(8192, length, windows=(torch.zeros(8192), torch.full((8192,), length)), seed=31)
            cases += [(f"L={length} k=2048 full", p, 2048), (f"L={length} k=8192 full", p, 8192)]
            cases += [(f"L={length} k=2048 causal", make(8192, length, seed=31), 2048)]
        full = torch.zeros(8192), torch.full((8192,), 131072)
        cases += [
            ("L=131072 k=2048 full iid", make(8192, 131072, windows=full, structure=False, weights="uniform"), 2048)
        ]
        cases += [(f"L=131072 k=2048 full h={h}", make(8192, 131072, h, windows=full, seed=33), 2048) for h in (4, 16)]
        cases += [("Q=2048 L=131072 k=2048 causal", make(2048, 131072, seed=34), 2048)]
        cases = cases[:1] if args.first else cases
        for name, p, k in cases:
            report["timings"][name] = row = time_stages(p, k)
            print(f"{name:<32}" + "  ".join(f"{column} {value:.4g}" for column, value in row.items()), flush=True)
    print(f"{time.time() - began:.0f} s")
    if out:
        out.write_text(json.dumps(report, indent=1))
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
