"""Checks, then times, routing with residual and what scores with it, on one Hopper GPU.

    python -m sglang_misa.bench.tune_route [--quick]

Every result is compared with fp64 PyTorch on some of its rows before it is timed, and a wrong one is not timed. 8192
new rows over 32K and 128K keys; clustered keys, heavy-tailed signed gates. Times are medians with a cold L2; the table
comes last.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_misa.bench.timing import event_us, kernel_us
from sglang_misa.kernels.build import build
from sglang_misa.kernels.layout import HEAD_DIM
from sglang_misa.kernels.prefill import topk_reranked as reranked
from sglang_misa.kernels.prefill import topk_routed as routed
from sglang_misa.kernels.prefill.residual import Residual
from sglang_misa.kernels.prefill.route import ROUTERS, Router, route

DEVICE, ROWS, TOPK, COLUMNS = "cuda", 8192, 2048, 8
CHECKED = 48  # rows of a call that are compared
TOLERANCE = 2e-3  # of a row's largest score: fp8 products are summed in fewer bits than fp32 has


@dataclass(frozen=True)
class Inputs:
    """One request's newest rows: queries, gates, all keys with their scales, and what each row sees."""

    index_q: Tensor
    gates: Tensor
    index_k: Tensor
    k_scale: Tensor
    lens: Tensor

    @property
    def starts(self) -> Tensor:
        return torch.zeros_like(self.lens)

    def pooled(self, block_size: int) -> Tensor:
        keys = self.index_k.float() * self.k_scale[:, None]
        return keys.view(-1, block_size, HEAD_DIM).mean(1).bfloat16()[None]


def make(index_heads: int, keys: int) -> Inputs:
    random = torch.Generator(DEVICE).manual_seed(keys + index_heads)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE, generator=random)

    topics = normal(keys // 256, HEAD_DIM)
    index_k = normal(keys, HEAD_DIM) + topics.repeat_interleave(256, 0)
    near = torch.randint(len(topics), (ROWS,), device=DEVICE, generator=random)
    index_q = normal(ROWS, index_heads, HEAD_DIM) + 0.7 * topics[near][:, None]
    gates = torch.exp(1.5 * normal(ROWS, index_heads))
    gates = torch.where(torch.rand(gates.shape, device=DEVICE, generator=random) < 0.1, -gates, gates)
    scale = 0.01 * (0.5 + torch.rand(keys, device=DEVICE, generator=random))
    lens = torch.arange(keys - ROWS + 1, keys + 1, device=DEVICE, dtype=torch.int32)
    fp8 = torch.float8_e4m3fn
    return Inputs(index_q.to(fp8), gates.contiguous(), index_k.to(fp8), scale, lens)


def checked_rows() -> list[int]:
    return [0, ROWS - 1, *torch.randint(ROWS, (CHECKED - 2,), generator=torch.Generator().manual_seed(1)).tolist()]


def route_problem(
    x: Inputs, head_ids: Tensor, residual: Residual | None, router: Router, block_size: int
) -> str | None:
    """What is wrong with the heads and residuals of some rows, if anything."""
    pooled = x.pooled(block_size)[0].double()
    if not (
        (head_ids[:, 1:] > head_ids[:, :-1]).all() and (head_ids >= 0).all() and (head_ids < x.gates.shape[1]).all()
    ):
        return "heads do not ascend, or are none"
    for row in checked_rows():
        q, w, chosen = x.index_q[row].double(), x.gates[row].double(), head_ids[row].long()
        products = q @ pooled[: int(x.lens[row]) // block_size].T
        positive = products.relu()
        statistic = {
            "mean": w.abs() * positive.mean(1),
            "peak": w.abs() * positive.amax(1),
            "signed": w * positive.mean(1),
            "weight": w.abs(),
        }[router]
        best = statistic.topk(len(chosen)).values
        if not torch.allclose(statistic[chosen].sort(descending=True).values, best, rtol=1e-4, atol=1e-9):
            return f"row {row}: other heads than the best"
        if residual is None:
            continue
        share = torch.special.ndtr(products.mean(1) / products.std(1, correction=0))
        others = torch.ones_like(w)
        others[chosen] = 0
        wanted = (w * share * others) @ q
        scale = residual.scale[row].double()
        if not torch.allclose(scale, wanted.abs().max() / 448, rtol=1e-3):
            return f"row {row}: residual scale {scale.item():.6g}, expected {wanted.abs().max().item() / 448:.6g}"
        error = (residual.query[row].double() * scale - wanted).abs()
        if (error > wanted.abs() * 0.064 + scale * 2**-9).any():
            return f"row {row}: residual off by {(error / scale).max().item():.4g} units"
    return None


def scores(x: Inputs, row: int, heads: Tensor, residual: Residual | None = None) -> Tensor:
    """Scores fp64 of all keys that a row sees, by some heads and a residual."""
    k = x.index_k[: int(x.lens[row])].double()
    total = x.gates[row, heads].double() @ (x.index_q[row, heads].double() @ k.T).relu()
    if residual is not None:
        total += residual.scale[row].double() * (k @ residual.query[row].double())
    return total * x.k_scale[: len(k)].double()


def topk_problem(
    x: Inputs, out: Tensor, head_ids: Tensor, residual: Residual | None, candidates: int | None
) -> str | None:
    """What is wrong with the selection of some rows, but for scores that may round either way at a cut."""
    everything = torch.arange(x.gates.shape[1], device=DEVICE)
    for row in checked_rows():
        cheap = scores(x, row, head_ids[row].long(), residual)
        slack = TOLERANCE * cheap.abs().max()
        final, surely, maybe = cheap, torch.ones_like(cheap, dtype=torch.bool), torch.ones_like(cheap, dtype=torch.bool)
        if candidates is not None and candidates < len(cheap):
            cut = cheap.topk(candidates).values[-1]
            surely, maybe = cheap > cut + slack, cheap >= cut - slack
        if candidates is not None:
            final = scores(x, row, everything)
            slack = TOLERANCE * final.abs().max()
        chosen = out[row].long()
        if chosen.unique().numel() != TOPK or chosen.min() < 0 or chosen.max() >= len(final):
            return f"row {row}: a position twice, or none of the row's"
        if not maybe[chosen].all():
            return f"row {row}: {int((~maybe[chosen]).sum())} are clearly no candidates"
        lowest = final.masked_fill(~surely, -torch.inf).topk(TOPK).values[-1]
        highest = final.masked_fill(~maybe, -torch.inf).topk(TOPK).values[-1]
        if (final[chosen] < lowest - slack).any():
            return f"row {row}: a chosen key is clearly below the k-th best"
        missed = surely & (final > highest + slack)
        missed[chosen] = False
        if missed.any():
            return f"row {row}: {int(missed.sum())} keys clearly among the best are missing"
    return None


def build_all(heads: tuple[int, ...]) -> None:
    """Every library that is needed, side by side."""
    os.environ["TVM_FFI_CUDA_ARCH_LIST"] = "9.0a"
    jobs: list[Callable[[], object]] = [lambda r=r: routed.module(COLUMNS, r) for r in (False, True)]
    for h in heads:
        jobs.append(lambda h=h: build("sm90/route.cu", MISA_INDEX_HEADS=h))
        jobs += [lambda h=h, r=r: reranked.module(COLUMNS, h, r) for r in (False, True)]
    with ThreadPoolExecutor(len(jobs)) as pool:
        list(pool.map(lambda job: job(), jobs))


class Table:
    """Lines of the report; what is wrong has no time."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.wrong = 0

    def add(self, name: str, problem: str | None, call: Callable[[], object], parts: bool = False) -> None:
        if problem is not None:
            self.wrong += 1
            self.lines.append(f"{name:58} WRONG: {problem}")
        else:
            self.lines.append(f"{name:58} {event_us([call])[0]:9.1f} us")
            if parts:
                self.lines += [f"    {kernel:54} {us:9.1f} us" for kernel, us in kernel_us(call).items() if us > 5]
        print(self.lines[-1], flush=True)


def measure(
    table: Table, index_heads: int, keys: int, block_sizes: tuple[int, ...], candidates: tuple[int, ...]
) -> None:
    x = make(index_heads, keys)
    batch = torch.zeros(ROWS, dtype=torch.int32, device=DEVICE)
    size = f"H={index_heads} {keys >> 10}K"
    for block_size in block_sizes:
        pooled = x.pooled(block_size)
        for router in ROUTERS:

            def plain(router: Router = router, block_size: int = block_size, pooled: Tensor = pooled) -> Tensor:
                return route(x.index_q, x.gates, pooled, batch, x.lens, COLUMNS, block_size, router)

            def both(
                router: Router = router, block_size: int = block_size, pooled: Tensor = pooled
            ) -> tuple[Tensor, Residual]:
                return route(x.index_q, x.gates, pooled, batch, x.lens, COLUMNS - 1, block_size, router, residual=True)

            table.add(
                f"{size} route {router}, block {block_size}", route_problem(x, plain(), None, router, block_size), plain
            )
            problem = route_problem(x, *both(), router, block_size)
            table.add(f"{size} route {router} + residual, block {block_size}", problem, both, parts=router == "peak")

    heads = route(x.index_q, x.gates, pooled, batch, x.lens, COLUMNS, block_size, "peak")
    fewer, residual = route(x.index_q, x.gates, pooled, batch, x.lens, COLUMNS - 1, block_size, "peak", residual=True)
    for name, ids, column in (("8 heads", heads, None), ("7 + residual", fewer, residual)):
        tensors = (x.index_q, x.gates, ids, x.index_k, x.k_scale, x.starts, x.lens)

        def direct(tensors: tuple[Tensor, ...] = tensors, column: Residual | None = column) -> Tensor:
            return routed.topk_routed(*tensors, TOPK, residual=column)

        table.add(
            f"{size} topk_routed, {name}", topk_problem(x, direct(), ids, column, None), direct, parts=keys > 1 << 16
        )
        for count in candidates:

            def again(
                tensors: tuple[Tensor, ...] = tensors, column: Residual | None = column, count: int = count
            ) -> Tensor:
                return reranked.topk_reranked(*tensors, count, TOPK, residual=column)

            table.add(
                f"{size} topk_reranked C={count}, {name}",
                topk_problem(x, again(), ids, column, count),
                again,
                parts=column is not None or count == 8192,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="H = 64 alone, blocks of 128 alone")
    quick = parser.parse_args().quick
    index_heads = (64,) if quick else (64, 32)
    build_all(index_heads)
    table = Table()
    for heads in index_heads:
        for keys in (1 << 17, 1 << 15):
            measure(table, heads, keys, (128,) if quick or heads == 32 else (64, 256, 128), (2048, 4096, 8192))
    print(f"\n{torch.cuda.get_device_name()}, {ROWS} rows, k = {TOPK}\n" + "\n".join(table.lines))
    sys.exit(table.wrong != 0)


if __name__ == "__main__":
    main()
