"""Check, then time `topk_routed` alone on plain and on hostile inputs, beside stock, and count the slow rows.

    python -m sglang_misa.bench.tune_scan [--rows 8192] [--quick]

Stock is DeepGEMM's logits of all heads and SGLang's top-k. A wrong selection is named and never timed.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from sglang_misa.bench.timing import event_us, kernel_us
from sglang_misa.kernels.build import Target
from sglang_misa.kernels.prefill import topk_routed as scan

TOPK, CHECKED_ROWS, REPEATS = 2048, 48, 7
PERIODS = (10, 24, 32, 48, 64, 100, 127, 512)


def problem(
    rows: int, keys: Tensor, routed: int, heads: int = 64, *, requests: int = 1, same: bool = False
) -> scan.Problem:
    """Rows at the ends of `requests` requests of as many keys each. keys [S, 128] of any numbers."""
    g = torch.Generator("cuda").manual_seed(1)
    q = torch.randn(rows, heads, 128, device="cuda", generator=g).to(torch.float8_e4m3fn)
    gates = torch.randn(rows, heads, device="cuda", generator=g).mul_(1.5).exp_().mul_(heads**-0.5)
    ids = torch.rand(rows, heads, device="cuda", generator=g).argsort(1)[:, :routed].sort(1).values.int().contiguous()
    scale = torch.rand(len(keys), device="cuda", generator=g) * 0.01 + 0.01
    if same:  # keys that are the same keep the same score
        scale.fill_(0.015)
    length, own = len(keys) // requests, rows // requests
    first = torch.arange(rows, device="cuda") // own * length
    ends = first + length - own + torch.arange(rows, device="cuda") % own + 1
    fp8 = keys.to(torch.float8_e4m3fn).contiguous()
    return scan.Problem(q, gates.contiguous(), ids, fp8, scale, first.int(), ends.int())


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", generator=torch.Generator("cuda").manual_seed(2))


def periodic(length: int, period: int, noise: float) -> Tensor:
    return (1 - noise) ** 0.5 * normal(period, 128).repeat(length // period + 1, 1)[:length] + noise**0.5 * normal(
        length, 128
    )


def cases(rows: int, quick: bool) -> Iterator[tuple[str, scan.Problem]]:
    long, short = 1 << 17, 1 << 15
    yield "random, 128K", problem(rows, normal(long, 128), 8)
    yield "random, 32K", problem(rows, normal(short, 128), 8)
    yield "one key, 128K", problem(rows, normal(1, 128).expand(long, -1), 8, same=True)
    yield "64 keys, 128K", problem(rows, normal(64, 128)[torch.randint(64, (long,), device="cuda")], 8, same=True)
    yield "zero scores, 128K", problem(rows, torch.zeros(long, 128, device="cuda"), 8)
    yield "one key, 32K", problem(rows, normal(1, 128).expand(short, -1), 8, same=True)
    for period in PERIODS[:3] if quick else PERIODS:
        yield f"period {period}, 128K", problem(rows, periodic(long, period, 0.3), 8)
    yield (
        "NaN keys but 1024, 128K",
        dataclasses.replace(
            base := problem(rows, normal(long, 128), 8),
            k_scale=torch.where(torch.arange(long, device="cuda") % 128 == 0, base.k_scale, torch.nan),
        ),
    )
    for own in (1, 16) if quick else (1, 4, 8, 16):
        yield f"64 requests x {own} rows, 128K", problem(64 * own, normal(long, 128).repeat(64, 1), 8, requests=64)
    yield "2048 rows, 512K", problem(2048, normal(1 << 19, 128), 8)
    yield "exact, H = 64, 128K", problem(rows, normal(long, 128), 64, 64)
    yield "exact, H = 32, 128K", problem(rows, normal(long, 128), 32, 32)


def wrong(p: scan.Problem, out: Tensor) -> str | None:
    """What is wrong with some rows' positions, by the kernel's own scores."""
    for row in torch.linspace(0, p.rows - 1, min(CHECKED_ROWS, p.rows)).long().unique().tolist():
        args = (p.index_q, p.head_gates, p.head_ids, p.index_k, p.k_scale, p.ks, p.ke)
        lo, hi = int(p.ks[row]), int(p.ke[row])
        scores = scan.routed_logits(*args, first=row, rows=1)[0, lo:hi].nan_to_num(nan=-torch.inf)
        best = torch.sort(scores, descending=True, stable=True).indices[:TOPK]
        if not torch.equal(out[row].long().sort().values, best.sort().values):
            return f"row {row}: {len(set(best.tolist()) - set(out[row].tolist()))} of {TOPK} differ"
    return None


def stock_ms(p: scan.Problem) -> float:
    import deep_gemm
    from sgl_kernel import fast_topk_v2

    step = max(1, (1 << 30) // p.keys)  # rows whose logits take 4 GiB

    def call() -> None:
        for a in range(0, p.rows, step):
            b = min(a + step, p.rows)
            keys = (p.index_k, p.k_scale)
            logits = deep_gemm.fp8_mqa_logits(
                p.index_q[a:b], keys, p.head_gates[a:b], p.ks[a:b], p.ke[a:b], clean_logits=False
            )
            fast_topk_v2(logits, p.ke[a:b] - p.ks[a:b], TOPK, row_starts=p.ks[a:b])

    return event_us([call], repeats=3)[0] / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--quick", action="store_true", help="fewer cases")
    args = parser.parse_args()
    stock: dict[tuple[int, ...], float] = {}
    print(f"{'case':34} {'ms':>8} {'stock':>8} {'ratio':>6} {'slow rows':>10}")
    for name, p in cases(args.rows, args.quick):
        out = torch.full((p.rows, TOPK), -7, dtype=torch.int32, device="cuda")
        call = scan.Ragged(p, Target(out), longest=int((p.ke - p.ks).max()))
        call.scratch.fill_(0xFF)
        counter = scan.slow_rows(p.device)
        before = int(counter)
        call.run()
        slow, problem_found = int(counter) - before, wrong(p, out)
        if problem_found:
            print(f"{name:34} WRONG: {problem_found}, {slow} slow rows")
            continue
        shape = (p.rows, p.keys, *p.head_gates.shape)
        if shape not in stock:
            try:
                stock[shape] = stock_ms(p)
            except (ImportError, RuntimeError, TypeError) as error:
                print(f"no baseline for {name}: {error}")
                stock[shape] = float("nan")
        ms = event_us([call.run], repeats=REPEATS)[0] / 1e3
        print(f"{name:34} {ms:8.3f} {stock[shape]:8.3f} {stock[shape] / ms:6.2f} {slow:10d}", flush=True)
        if name.startswith(("random", "exact", "one key")):
            print("   ", ", ".join(f"{kernel} {us:.0f}" for kernel, us in kernel_us(call.run, repeats=2).items()))
        del p, call, out


if __name__ == "__main__":
    main()
