"""`topk_reranked` on the CPU (simt/), from marks to the top k, against numpy."""

import ctypes

import numpy as np
import pytest
from exact_rows import TOPK, ExtendCase, scratch_of_sample
from on_cpu import COMPILER, aligned, call, ints

from sglang_misa.kernels.prefill import plan as plans
from sglang_misa.kernels.prefill import topk_reranked as rerank

pytestmark = COMPILER


def shape(index_heads: int, columns: int, residual: int) -> dict[str, int]:
    return {"index_heads": index_heads, "columns": columns, "residual": residual}


SHAPES = [(32, 8, 0), (32, 8, 1), (64, 4, 1), (64, 16, 1)]
LIBRARIES = [("topk_reranked", shape(*each)) for each in SHAPES]
FEW = ((20, 1500), (12, 300), (2, 2))  # requests, where each row is slow


@pytest.fixture(scope="module", params=SHAPES, ids="H={0[0]} {0[1]} columns {0[2]}".format)
def reranking(request, library) -> tuple[ctypes.CDLL, tuple[int, int, int]]:
    return library("topk_reranked", **shape(*request.param)), request.param


@pytest.mark.parametrize("candidates", [TOPK, 256])
def test_marked_and_reranked_rows_have_the_exact_top_k_of_their_candidates(reranking, candidates):
    loaded, (all_heads, columns, residual) = reranking
    case = ExtendCase(candidates, all_heads, columns, bool(residual))
    assert check_reranked(loaded, case, columns, candidates) <= case.rows // 10


@pytest.mark.parametrize(("distinct", "nearly"), [(1, False), (3, True)], ids=["tied", "nearly tied"])
def test_reranked_rows_take_tied_candidates_in_order(reranking, distinct, nearly):
    """More keys share the 16 bits of the cut's score than are ranked against each other; all of them, or nearly.

    Nearly: a few keys far above the others make those bits coarse.
    """
    loaded, (all_heads, columns, residual) = reranking
    case, candidates = ExtendCase(distinct, all_heads, columns, bool(residual), FEW), 400
    scale = np.ones(case.keys)
    if nearly:
        scale += np.random.default_rng(distinct).integers(0, 8, case.keys) / 2**14
        scale[::100] *= 2**20
    case.repeat(distinct, scale)
    assert check_reranked(loaded, case, columns, candidates) <= case.rows // 10


def test_requests_share_a_call_and_a_block_of_rows(reranking):
    """Few rows each, of windows that begin and end anywhere, and all their marks behind one another."""
    loaded, (all_heads, columns, residual) = reranking
    seed = columns + residual
    case = ExtendCase(seed, all_heads, columns, bool(residual), many_requests(seed))
    case.scale[::37] = case.keys_held[1][::37] = np.nan
    check_reranked(loaded, case, columns, candidates=128)


def test_rows_of_several_requests_are_redone(reranking):
    """A block has no room to list what passes, so that rows of every request fail."""
    loaded, (all_heads, columns, residual) = reranking
    case = ExtendCase(3, all_heads, columns, bool(residual), many_requests(3, most_rows=2))
    assert check_reranked(loaded, case, columns, candidates=128, room=160) > case.rows // 2


def many_requests(seed: int, most_rows: int = 6) -> list[tuple[int, int]]:
    """Requests of 1 … `most_rows` rows over 1 … 600 keys, and one whose rows fill a block."""
    random = np.random.default_rng(seed)
    few = [(int(random.integers(1, most_rows + 1)), int(random.integers(1, 600))) for _ in range(14)]
    return [*few, (70, 333), *few[:3]] if most_rows > 2 else few


def check_reranked(
    loaded: ctypes.CDLL, case: ExtendCase, columns: int, candidates: int, room: int | None = None
) -> int:
    """Check a call's rows, those that fail among them; returns how many do."""
    workers = 3
    block_rows = plans.block_rows(columns)
    plan = rerank.plan(case.rows, case.longest, candidates, block_rows, workers, total=case.keys)
    assert plan.rows >= case.rows
    failed, out, ever = ints(np.full(case.rows + 1, -1)), ints(np.full((case.rows, TOPK), -7)), np.zeros(1, np.int64)
    numbers = (plan.stride, plan.rank, candidates, TOPK, workers, room or plan.room, plan.pitch)
    room_of_marks, at_once = plan.scores_offset - plan.marks_offset, 50
    marks = aligned(np.full(room_of_marks + 4096, 0xFF), np.uint8)
    scratch = (
        aligned(np.full((case.rows, plan.sampled), np.nan), np.float32),
        plan.sampled,
        aligned(np.full((case.rows, 2), 7), np.uint32),
        ints(np.full(plan.rows // block_rows + 2 * workers + 3, -7)),
        *scratch_of_sample(plan.rows, case.keys, plan.stride),
        marks,
        aligned(np.full((at_once, plan.ld), np.nan), np.float32),
        plan.ld,
        at_once,
        ever,
    )
    call(loaded.rerank_rows, *case.inputs, *case.windows, *numbers, *scratch, out, failed)

    def best(row):
        kept = np.sort(np.argsort(-case.routed(row).astype(np.float32), kind="stable")[:candidates])
        return kept[np.argsort(-case.scores(row, slice(None)).astype(np.float32)[kept], kind="stable")[:TOPK]]

    assert (marks[room_of_marks:] == 0xFF).all(), "marks beyond what was planned for them"
    case.check_rows(out, range(case.rows), best)
    assert ever[0] == failed[0]
    return int(failed[0])
