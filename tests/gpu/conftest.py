"""Tests that need a Hopper GPU: `pytest -m gpu tests/gpu`. Elsewhere they are skipped.

Sources are compiled side by side before the first test that needs one; what a kernel leaves unwritten starts as NaN.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sglang_misa.bench.compile import side_by_side
from sglang_misa.bench.inputs import FP8, pack_pages
from sglang_misa.kernels.build import build
from sglang_misa.kernels.layout import HEAD_DIM, INDEX_HEADS, PAGE, PAGE_BYTES, ROUTED_HEADS
from sglang_misa.kernels.prefill import topk_reranked, topk_routed, workspace

HERE = Path(__file__).parent


def missing() -> str | None:
    """Why the tests cannot run on this machine."""
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU"
    if torch.cuda.get_device_capability() != (9, 0):
        return f"needs a Hopper GPU (sm_90), got {torch.cuda.get_device_name()}"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = missing()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def compiled() -> None:
    """Every CUDA source in the shapes that the tests use, built side by side."""
    jobs: list[Callable[[], object]] = []
    for residual in (False, True):
        jobs += [functools.partial(topk_routed.module, columns, residual) for columns in ROUTED_HEADS]
        reranked = ((4, 64), (8, 64), (16, 64), (32, 64), (8, 32))
        jobs += [functools.partial(topk_reranked.module, *shape, residual) for shape in reranked]
    sources = ("topk_blocks", "route")
    jobs += [functools.partial(build, source, index_heads=heads) for source in sources for heads in INDEX_HEADS]
    side_by_side(jobs)


@pytest.fixture(scope="session")
def prefix() -> tuple[torch.Tensor, torch.Tensor]:
    """Index-K pages of 128K tokens in a pool of twice as many, NaN in the free ones; their shuffled table [1, W]."""
    pages = 131072 // PAGE
    keys = torch.randn(pages * PAGE, HEAD_DIM, device="cuda").add_(0.2).to(FP8)
    table = torch.randperm(2 * pages, device="cuda")[:pages]
    pool = torch.full((2 * pages, PAGE_BYTES), 0xFF, dtype=torch.uint8, device="cuda")
    pool[table] = pack_pages(keys, torch.rand(pages * PAGE, device="cuda").add_(0.5))
    return pool, table.int()[None]


@pytest.fixture(autouse=True)
def _exact_and_poisoned(compiled: None, poisoned_empty: None) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    for held in workspace._scratch.values():
        held.fill_(0xFF)  # NaN, and counts of -1
