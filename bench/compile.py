"""Builds of CUDA sources, side by side: the first call would build them one after another."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from sglang_misa.config import Phase, SelectionPolicy
from sglang_misa.kernels.build import build
from sglang_misa.kernels.prefill import topk_reranked, topk_routed

Job = Callable[[], object]


def jobs(phase: Phase, policies: Iterable[SelectionPolicy], index_heads: Sequence[int]) -> list[Job]:
    """What the kernels of `policies` are built from, for each H; none for decode's, which are quickly built."""
    found: dict[tuple[object, ...], Job] = {}
    for policy in policies if phase == "prefill" else ():
        for heads in index_heads:
            columns = policy.columns or heads
            if policy.pooled:
                found["route", heads] = functools.partial(build, "route", index_heads=heads)
                if policy.router == "error":
                    found["choose", heads] = functools.partial(build, "choose_heads", index_heads=heads)
            if policy.blocks is not None:
                found["blocks", heads] = functools.partial(build, "topk_blocks", index_heads=heads)
            elif policy.candidates is not None:
                shape = columns, heads, policy.residual
                found["reranked", *shape] = functools.partial(topk_reranked.module, *shape)
            else:
                scorer = columns, policy.residual
                found["routed", *scorer] = functools.partial(topk_routed.module, *scorer)
    return list(found.values())


def side_by_side(wanted: Sequence[Job]) -> None:
    """Run all of `wanted`; the first error is raised."""
    os.environ["TVM_FFI_CUDA_ARCH_LIST"] = "9.0a"  # `build` sets and restores it: here for all threads at once
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(job) for job in wanted]:
            done.result()
