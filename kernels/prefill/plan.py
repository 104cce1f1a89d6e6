"""How a prefill call is divided: the sample, its threshold's rank, and the room for what passes.

The r-th largest of a 1/n sample leaves about n·Gamma(r) keys above it. r solves r - z√r = k/n with
z = 4.5, so a row comes out short with probability 3e-6. A row's room lies z standard deviations above what is expected,
a buffer's 6.5 or 8, for a call has a quarter of a million of them. Buffers also get what the budget leaves: hits that
come in clusters are not shared out by chance.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from sglang_misa.kernels.layout import HEAD_DIM

SCRATCH_BYTES = 256 << 20
SAMPLED_AT_MOST = 49152  # scores that `threshold` holds
SIGMAS = 4.5  # z: standard deviations of room on either side of a row's expected count
BUFFER_SIGMAS = {32: 6.5, 16: 8.0}  # the same for a private buffer, as in topk_routed.cu
THRESHOLD_BYTES = 12  # of a row: a score, one that ties, and where the tied end
COUNTS = 2048  # private buffers of a row at most: `select` brings each one's entries by a copy of its own
TILE = 128  # keys that the scorer takes at once
SECTOR = 4  # entries that are written at once
BURST = 4  # entries that one tile may bring to a private buffer
SPARE = 64  # entries at most that a private buffer gets of what the budget leaves
MANY = 0.07  # share of keys that pass above which hits are written by sectors, for 8 routed heads


def block_rows(heads: int) -> int:
    """Query rows of one thread block of the scorer: two warpgroups of 256 columns, of 4 heads three of 128."""
    return 2 * 256 // heads if heads > 4 else 3 * 128 // heads


def buffers(heads: int, density: float) -> int:
    """Private buffers of a row in each thread block that scores it, where `density` of its keys are expected to pass.

    Each thread writes its hits as they come (32), or, where that would hold the scorer up, two share a buffer and write
    by sectors (16).
    """
    return 16 if heads < 64 and density * 8 / heads > MANY else 32


def sample_stride(keys: int, heads: int) -> int:
    """One key in so many is sampled: a denser sample costs scores, and saves hits that a sparser one lets pass.

    Of few heads or keys, storing hits limits the collector, and fewer of them pay.
    """
    stores_limit = max(46 << 10, (640 << 10) // heads)
    wanted = 8 if keys <= 22 << 10 else 16 if keys <= stores_limit else 32
    return max(wanted, math.ceil(keys / SAMPLED_AT_MOST))


@dataclass(frozen=True)
class Plan:
    """Division of one call's work into passes of `rows` rows; `scheduler.cuh` divides a pass among thread blocks."""

    rows: int
    workers: int  # thread blocks that collect
    buffers: int  # of a row in each of them that has keys of it
    stride: int  # one key in so many is sampled
    rank: int  # of the threshold in the sample
    spare: int  # entries of a private buffer beyond what is expected at most: a tile's, and what the budget leaves
    entries: int  # that a private buffer holds, summed over the workers
    room: int  # entries of a row that `select` can hold
    sampled: int  # columns of the sampled scores
    division_offset: int  # in bytes: thresholds lie before
    counts_offset: int
    sample_offset: int  # of the sampled keys
    scale_offset: int  # of their scales
    bulk_offset: int  # of entries or scores

    @property
    def runs(self) -> int:
        """Workers that share a row's keys, at most."""
        return COUNTS // self.buffers


def aligned(count: float, to: int = 256) -> int:
    return math.ceil(count / to) * to


def division_bytes(row_blocks: int, workers: int) -> int:
    """Of a Division, as items.cuh lays it out."""
    return aligned(4 * (1 + row_blocks + 1 + workers + workers + 1))


def threshold_rank(k: int, stride: int) -> int:
    """The r of a 1/stride sample above whose r-th score lie at least k keys: r - z√r = k / stride."""
    return math.ceil(((SIGMAS + math.sqrt(SIGMAS**2 + 4 * k / stride)) / 2) ** 2)


def most_hits(rank: int, stride: int) -> float:
    """Keys above the `rank`-th score of such a sample, hardly ever more."""
    return (rank + SIGMAS * math.sqrt(rank)) * stride


@functools.lru_cache(maxsize=256)
def plan(
    rows: int,
    keys: int,
    k: int,
    heads: int,
    multiprocessors: int,
    budget: int = SCRATCH_BYTES,
    total: int | None = None,
) -> Plan:
    """Choose the sample, and as few passes as `budget` bytes of scratch allow; rows see at most `keys` of `total` keys.

    Scratch of a pass: thresholds, division, counts, sampled keys, and max(8 · rows of a block · buffers · entries,
    4 · rows · keys / stride) bytes. Raises ValueError when one block of rows does not fit.
    """
    stride = sample_stride(keys, heads)
    rank = threshold_rank(k, stride)
    sampled = aligned(keys / stride + 1, 4)  # a window's ends may each cut through the keys that one stands for
    sample_keys = math.ceil((keys if total is None else total) / stride)
    block, subs = block_rows(heads), buffers(heads, rank * stride / max(keys, 1))
    blocks = math.ceil(rows / block)
    for passes in range(1, blocks + 1):
        pass_blocks = math.ceil(blocks / passes)
        workers = min(multiprocessors, pass_blocks * (COUNTS // subs - 1))
        # Shares of rows vary, but what holds least a row is sharing evenly: the room is a concave function of the part.
        expected = rank * stride / subs * pass_blocks / workers
        capacity = expected + BUFFER_SIGMAS[subs] * math.sqrt(expected + expected**2 / rank) + SECTOR
        entry_bytes = 8 * block * subs  # of one entry of each buffer of a worker
        pass_rows = pass_blocks * block
        division = aligned(THRESHOLD_BYTES * pass_rows)
        counts = division + division_bytes(pass_blocks, workers)
        sample = counts + aligned(8 * (pass_rows + workers * block) * subs)
        scale = sample + aligned(HEAD_DIM * sample_keys)
        bulk = scale + aligned(4 * sample_keys)
        entries = aligned(workers * (capacity + BURST), SECTOR)
        needed = bulk + max(entry_bytes * entries, 4 * pass_rows * sampled)
        if needed <= budget:
            left = (budget - bulk - entry_bytes * entries) // (entry_bytes * workers)
            spare = BURST + min(max(left, 0), SPARE) // SECTOR * SECTOR
            entries = aligned(workers * (capacity + spare), SECTOR)
            return Plan(
                rows=pass_rows,
                workers=workers,
                buffers=subs,
                stride=stride,
                rank=rank,
                spare=spare,
                entries=entries,
                room=aligned(most_hits(rank, stride)),
                sampled=sampled,
                division_offset=division,
                counts_offset=counts,
                sample_offset=sample,
                scale_offset=scale,
                bulk_offset=bulk,
            )
    raise ValueError(f"scratch budget: expected at least {needed} bytes for k={k}, {keys} keys; got {budget}; raise it")
