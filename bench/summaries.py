"""Which summary of a token block finds its tokens: recall of DSA's top k by summary and by kind of keys, on the CPU.

    python -m sglang_misa.bench.summaries [--length 32768] [--rows 48] [--seeds 3]

Every row keeps 8192 tokens in blocks and takes its top 2048 of them with all heads, as HISA does; recall is the share
of DSA's top 2048 over all tokens. The papers keep one mean a block. The others cost as many bytes as page means do (2
vectors for 128 tokens). Keys are made up, of known kinds: the table ranks summaries, it predicts no model's recall.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from sglang_misa import reference
from sglang_misa.kernels.layout import HEAD_DIM, PAGE

HEADS, DIM, TOPK, KEPT = 64, HEAD_DIM, 2048, 8192
BLOCK = 128
Summary = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [T, H, 128], gates [T, H], keys [L, 128] → block scores [T, M]


def blocks_of(keys: Tensor, size: int) -> Tensor:
    """[M, size, 128]"""
    return keys.unflatten(0, (-1, size))


def gated(dots: Tensor, gates: Tensor) -> Tensor:
    """Σ_j w_j · ReLU(dots_j): [T, H, M] → [T, M]."""
    return torch.einsum("th,thm->tm", gates, dots.relu())


def mean(q: Tensor, gates: Tensor, keys: Tensor, size: int = BLOCK) -> Tensor:
    return gated(q @ blocks_of(keys, size).mean(1).T, gates)


def pages(q: Tensor, gates: Tensor, keys: Tensor) -> Tensor:
    """The better of a block's two page means."""
    return mean(q, gates, keys, PAGE).unflatten(1, (-1, BLOCK // PAGE)).amax(2)


def box(q: Tensor, gates: Tensor, keys: Tensor) -> Tensor:
    """Bound of q·k over the box that holds the keys, by head (Quest, arXiv 2406.10774)."""
    low, high = blocks_of(keys, BLOCK).aminmax(dim=1)
    return gated(q.relu() @ high.T - (-q).relu() @ low.T, gates)


def spread(q: Tensor, gates: Tensor, keys: Tensor) -> Tensor:
    """q·mean plus two standard deviations of q·k, were the dimensions independent."""
    block = blocks_of(keys, BLOCK)
    return gated(q @ block.mean(1).T + 2 * (q.square() @ block.var(1).T).sqrt(), gates)


def halves(q: Tensor, gates: Tensor, keys: Tensor) -> Tensor:
    """The better of the means of two halves, cut across the direction in which the keys vary most."""
    block = blocks_of(keys, BLOCK)
    centred = block - block.mean(1, keepdim=True)
    axis = torch.linalg.svd(centred, full_matrices=False).Vh[:, 0]  # [M, 128]
    upper = torch.einsum("mkd,md->mk", centred, axis) > 0
    scores = []
    for part in (upper, ~upper):
        count = part.sum(1, keepdim=True)
        half = torch.einsum("mkd,mk->md", block, part.float()) / count.clamp_min(1)
        scores.append(gated(q @ torch.where(count > 0, half, block.mean(1)).T, gates))
    return torch.maximum(*scores)


SUMMARIES: dict[str, tuple[int, int, Summary]] = {  # block size, bytes for 128 tokens, block scores
    "mean of 128 (HISA)": (BLOCK, 256, mean),
    "mean of 64": (PAGE, 512, lambda q, gates, keys: mean(q, gates, keys, PAGE)),
    "better of two page means": (BLOCK, 512, pages),
    "box": (BLOCK, 512, box),
    "mean and spread": (BLOCK, 512, spread),
    "better of two halves": (BLOCK, 512, halves),
}


def make(kind: str, length: int, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, H, 128], gates [T, H] and keys [L, 128].

    independent: nothing is shared; topics: runs of about 200 tokens share a direction, and queries lean towards some;
    needles: topics, and one token in 512 stands out in a direction that some heads of every query look for.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, keys = normal(rows, HEADS, DIM), normal(length, DIM)
    gates = (1.5 * normal(rows, HEADS)).exp() * torch.where(torch.rand(rows, HEADS, generator=generator) < 0.1, -1, 1)
    if kind != "independent":
        ends = torch.rand(length, generator=generator) < 1 / 200
        topic = ends.cumsum(0)
        topics = normal(int(topic[-1]) + 1, DIM)
        keys += topics[topic]
        q += 0.7 * topics[torch.randint(len(topics), (rows,), generator=generator)][:, None]
    if kind == "needles":
        directions = normal(8, DIM)
        at = torch.arange(0, length, 512) + torch.randint(512, (length // 512,), generator=generator)
        keys[at] += 2 * directions[torch.randint(8, (len(at),), generator=generator)]
        q[:, ::4] += directions[torch.randint(8, (rows, HEADS // 4), generator=generator)]
    return q, gates, keys


def recall(q: Tensor, gates: Tensor, keys: Tensor, size: int, block_scores: Tensor) -> float:
    """Mean share of DSA's top k that lies in the best blocks, the first and the newest included."""
    dense = reference.index_scores(q[None], gates[None], keys[None])[0]
    best = dense.topk(TOPK).indices
    complete = torch.full((1, len(q)), len(keys) // size)
    kept = reference.keep_blocks(block_scores[None], complete, KEPT // size)[0]
    return float(kept.gather(1, best // size).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    kinds = ("independent", "topics", "needles")
    print(f"{'recall at ' + str(options.length):<28}{'bytes/128':>10}" + "".join(f"{kind:>14}" for kind in kinds))
    cases = [
        [make(kind, options.length, options.rows, torch.Generator().manual_seed(s)) for s in range(options.seeds)]
        for kind in kinds
    ]
    for name, (size, cost, score) in SUMMARIES.items():
        found = [[recall(*case, size, score(*case)) for case in seeds] for seeds in cases]
        print(f"{name:<28}{cost:>10}" + "".join(f"{sum(f) / len(f):>14.3f}" for f in found), flush=True)


if __name__ == "__main__":
    main()
