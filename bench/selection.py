"""What cheap selections keep of DSA's tokens, on index tensors of a trained model, and what they cost.

    python -m sglang_misa.bench.selection FILE... [--length N...] [--rows 64] [--csv FILE] [--plot FILE]

FILE: safetensors with index_q [T, H, 128] and index_k [L, 128] in fp8, head_gates [T, H], k_scale [L] and positions [T]
of one layer, as a server writes them with --misa-dump. Row t sees the keys up to its position, or the newest --length
of them: its window starts at a multiple of 1024, so that pages and blocks are those of the file, and holds up to 1023
keys less. Without --length it is the longest file's keys, up to 131072. Every policy is scored in fp32 by `reference`.

recall: mean share of DSA's top k (2048, or what a dump's model has) that the policy selects (with candidates: that lie
among them, as all heads score those again); p10: the tenth percentile of the rows; worst_layer: the lowest
mean of a layer, over all its files. columns: scored columns a key; flop
and bytes: of prefill's arithmetic and of decode's reads, over stock's. A policy is on a phase's front when no other
keeps as much for less.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sglang_misa import reference, reference_pages
from sglang_misa.arguments import at_least, device, file_to_write, picture
from sglang_misa.bench.inputs import pack_pages, trained_file
from sglang_misa.bench.selection_table import FIELDS, Shares, plot, table, together
from sglang_misa.config import Phase, Router, SelectionPolicy
from sglang_misa.kernels.layout import PAGE, ROUTERS
from sglang_misa.outlet import kept_stdout
from sglang_misa.policy_file import ModelIdentity
from sglang_misa.validation import parsed, short, validated

TOPK = 2048  # of a file that does not tell its model
LENGTH = 131072  # that is measured at where none is given and a file holds as much
ALIGN = 1024  # a window's start: the largest block
CANDIDATES = (1.5, 2, 4, 8)  # times the top k
BLOCK_SIZES = (64, 128, 256, 512, 1024)
COLUMNS = (4, 8, 16)  # scored columns, the residual counted
HISA = ((64, 128), (128, 64), (256, 64), (512, 64))  # blocks, block size
BITS: tuple[Literal[1, 2], ...] = (1, 2)


@dataclass(frozen=True)
class Row:
    """A query row and the keys that it sees."""

    index_q: Tensor  # [H, 128] fp32
    head_gates: Tensor  # [H]
    keys: Tensor  # [L, 128] fp32
    means: Tensor  # [L // 64, 128] of its complete pages
    topk: int

    @cached_property
    def products(self) -> Tensor:
        """ReLU(q·k) [H, L]."""
        return (self.index_q @ self.keys.T).relu_()

    @cached_property
    def wanted(self) -> Tensor:
        """DSA's top k, positions [k]."""
        return (self.head_gates @ self.products).topk(min(self.topk, len(self.keys))).indices

    @cached_property
    def _found(self) -> dict[tuple[int, int, int, Router, bool], reference.BlockStatistics]:
        return {}

    def known(self, policy: SelectionPolicy) -> int:
        """Tokens whose pages have statistics: over sketches all before the newest complete page, as when serving."""
        pages = len(self.keys) // PAGE
        return PAGE * (pages if policy.sketch is None else max(pages - 1, 0))

    def statistics(self, policy: SelectionPolicy) -> reference.BlockStatistics:
        """The router's view of the row, over blocks of the policy's size; computed once."""
        complete = self.known(policy) // policy.block_size
        counts = torch.tensor([[complete]], device=self.keys.device)
        view = reference.RouterView.of(policy, counts)
        stride = 1 if view.stride is None else int(view.stride)
        key = complete, policy.block_size, stride, view.router, view.tilted
        if key not in self._found:
            k_tilde = reference.block_means(self.means[None], policy.block_size // PAGE)
            rows = self.index_q[None, None], self.head_gates[None, None]
            self._found[key] = reference.block_statistics(*rows, k_tilde, counts, view)
        return self._found[key]

    def scores(self, policy: SelectionPolicy, sketched: Row | None = None) -> Tensor:
        """The policy's scores [L] before candidates are scored again, -inf where a token is not kept.

        sketched: the same row with the keys that its pages' sketches stand for.
        """
        statistics = self.statistics(policy)
        positive = statistics.positive[0, 0]
        ids = None if policy.heads is None else reference.top_heads(statistics.heads[0, 0], policy.heads)
        queries, gates, residual = reference.columns(policy, self.index_q, self.head_gates, ids, positive)
        if sketched is None:
            keys, products = self.keys, self.products if ids is None else self.products[ids]
        else:
            keys, products = sketched.keys, (queries @ sketched.keys.T).relu_()
        scores = gates @ products
        if residual is not None:
            query, scale = residual
            scores = scores + scale * (keys @ query)
        if policy.blocks is not None:
            complete = torch.tensor([[self.known(policy) // policy.block_size]], device=scores.device)
            kept = reference.keep_blocks(statistics.blocks, complete, policy.blocks)[0, 0]
            tokens = kept.repeat_interleave(policy.block_size)
            scores = scores.clone()
            scores[: len(tokens)].masked_fill_(~tokens, -torch.inf)
        if policy.sketch is not None:  # what has no sketch yet is always among the candidates
            scores = scores.clone()
            scores[self.known(policy) :] = torch.inf
        return scores

    def kept(self, scores: Tensor, counts: Sequence[int]) -> list[float]:
        """The share of DSA's set that lies among the best `n` of `scores`, for each of `counts`.

        Of equal scores at the n-th place any may be taken, and the mean over all choices counts: where the ReLU of each
        routed head is zero, thousands of tokens are level.
        """
        best = scores.topk(min(max(counts), len(scores))).values
        wanted = scores[self.wanted]
        shares = []
        for n in counts:
            least = best[min(n, len(best)) - 1]
            level = scores == least
            taken = torch.where(least > -torch.inf, (n - (scores > least).sum()) / level.sum(), 0.0).clamp(max=1)
            shares.append(float(((wanted > least) + (wanted == least) * taken).mean()))
        return shares


@dataclass(frozen=True)
class Layer:
    """Index tensors of one layer."""

    path: Path
    index_q: Tensor
    head_gates: Tensor
    keys: Tensor  # [L, 128] fp32, dequantised
    pages: Tensor  # [L // 64, 8448] uint8
    positions: Tensor
    model: ModelIdentity | None  # whose tensors these are, where the file tells
    name: str  # the layer's number, where the file tells it

    @classmethod
    def load(cls, path: Path, rows: int, device: str = "cpu") -> Layer:
        """`rows` of the file's rows, evenly. Raises ValueError where a tensor is missing, or others do not fit it."""
        tensors = trained_file(path)
        if "positions" not in tensors:
            raise ValueError(f"{path}: expected positions of the rows, got none; give the position of each row's token")
        positions, count, held = tensors["positions"], len(tensors["index_q"]), len(tensors["k_scale"])
        whole_numbers = positions.dtype in (torch.int32, torch.int64)
        if positions.shape != (count,) or not (whole_numbers and ((positions >= 0) & (positions < held)).all()):
            raise ValueError(
                f"{path}: expected the positions of {count} rows, each from 0 to {held - 1}, got "
                f"{short(positions.tolist())}; give the position of each row's token"
            )
        whole = held // PAGE * PAGE
        picked = torch.linspace(0, count - 1, min(rows, count)).long()
        parts = (
            tensors["index_q"].float()[picked],
            tensors["head_gates"].float()[picked],
            tensors["index_k"].float() * tensors["k_scale"][:, None],
            pack_pages(tensors["index_k"][:whole], tensors["k_scale"][:whole]),
            positions[picked],
        )
        index_q, gates, keys, pages, positions = (part.to(device) for part in parts)
        return cls(path, index_q, gates, keys, pages, positions, *told_by(path))

    def at(self, rows: Tensor) -> Layer:
        """Those of its rows that a mask [rows] names."""
        return replace(
            self, index_q=self.index_q[rows], head_gates=self.head_gates[rows], positions=self.positions[rows]
        )

    @property
    def index_heads(self) -> int:
        return int(self.head_gates.shape[1])

    @property
    def facts(self) -> dict[str, object]:
        """What all files of one model have in common, as far as this one tells it."""
        told = {} if self.model is None else {"as config_sha256": self.model.config_sha256}
        return {"index heads": self.index_heads, "keys to select": self.topk, **told}

    @property
    def topk(self) -> int:
        return TOPK if self.model is None else self.model.index_topk

    @cached_property
    def means(self) -> Tensor:
        return reference_pages.page_means(self.pages).bfloat16()

    def sketched(self, bits: int) -> Tensor:
        """Keys fp32 [L, 128] as sketches of `bits` bits say; those past the last complete page as they are."""
        codes, scales = reference_pages.quantize_pages(self.pages, self.means, bits)
        keys = self.keys.clone()
        keys[: len(self.pages) * PAGE] = reference_pages.sketched_keys(codes, scales, self.means, bits).flatten(0, 1)
        return keys

    def starts(self, length: int) -> Tensor:
        """Where the rows' windows of the newest `length` keys start [rows]."""
        return -(-(self.positions + 1 - length).clamp(min=0) // ALIGN) * ALIGN

    def check(self, length: int) -> None:
        """Raise ValueError where a row sees no more keys than are selected, of which every policy keeps all."""
        if (early := self.positions.min()) < self.topk:
            raise ValueError(
                f"{self.path}: expected rows that see more than the {self.topk} keys to select, got one at position "
                f"{early}; leave it out"
            )
        if (seen := (self.positions + 1 - self.starts(length)).min()) <= self.topk:
            raise ValueError(
                f"--length: expected all keys of {self.path} or {self.topk + ALIGN}, as windows start at multiples of "
                f"{ALIGN}, got {length}, which leaves a row {max(int(seen), 0)} to select {self.topk} of; raise it"
            )

    def rows(self, length: int, keys: Tensor | None = None) -> Iterator[Row]:
        """The rows, over `keys` instead of the layer's own."""
        keys = self.keys if keys is None else keys
        places = self.positions.tolist(), self.starts(length).tolist()
        for q, gates, position, start in zip(self.index_q, self.head_gates, *places, strict=True):
            pages = self.means[start // PAGE : (position + 1) // PAGE]
            yield Row(q, gates, keys[start : position + 1], pages.float(), self.topk)


def told_by(path: Path) -> tuple[ModelIdentity | None, str]:
    """Model and layer that a file of index tensors says it is of; of a file that tells no layer, its own path.

    Raises ValueError where it tells its model wrongly.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        facts = file.metadata() or {}
    told = facts.get("model")
    model = None if told is None else validated(ModelIdentity, parsed(told, f"{path}: model"), f"{path}: model")
    return model, facts.get("layer", str(path))


def judged(paths: Iterable[Path], rows: int, lengths: Sequence[int], *, bound: bool = False) -> list[int]:
    """The lengths to measure files at: `lengths`, or that of the longest file, up to LENGTH, where none is given.

    bound: take what the longest file holds for a length beyond it. Raises ValueError, before anything is computed, for
    a file that does not fit, files of two models, a length that no file holds, and one that leaves nothing to select.
    """
    longest, known, seen = 0, dict[str, object](), set[Path]()
    for path in paths:
        if path.resolve() in seen:
            raise ValueError(f"{path}: expected each file once, as its rows count once, got it twice; drop it")
        seen.add(path.resolve())
        layer = Layer.load(path, rows)
        for name, value in layer.facts.items():
            if known.setdefault(name, value) != value:
                raise ValueError(f"{path}: expected {known[name]} {name}, got {value}; name one model's files")
        longest = max(longest, len(layer.keys))
        for length in lengths or [LENGTH]:
            layer.check(length)
    if bound or not lengths:
        return [min(length, longest) for length in lengths or [LENGTH]]
    if max(lengths) > longest:
        raise ValueError(f"--length: expected at most {longest}, the longest file's keys, got {max(lengths)}; lower it")
    return [*lengths]


def policies() -> list[tuple[Phase, SelectionPolicy]]:
    """Everything that is compared: routed heads, HISA's blocks, and sketches; without candidates."""
    found: list[tuple[Phase, SelectionPolicy]] = []
    for columns, router, residual, size in itertools.product(COLUMNS, ROUTERS, (False, True), BLOCK_SIZES):
        if router == "weight" and not residual and size != BLOCK_SIZES[0]:
            continue  # |w| looks at no block
        if router == "error" and not residual:
            continue  # it is the residual's
        heads = columns - residual
        found.append(("prefill", SelectionPolicy(heads=heads, router=router, residual=residual, block_size=size)))
    found += [("decode", SelectionPolicy(blocks=blocks, block_size=size)) for blocks, size in HISA]
    for bits in BITS:
        all_heads = SelectionPolicy(sketch=bits, block_size=PAGE)
        routed = ({"heads": h, "router": r, "residual": True} for h in (7, 15) for r in ("peak", "error"))
        found += [("decode", p) for p in (all_heads, *(all_heads.model_copy(update=axes) for axes in routed))]
    return found


def candidate_counts(topk: int) -> list[int]:
    """How many tokens are scored again: CANDIDATES times the top k, as multiples of a page, which sketches want."""
    return [int(n * topk) // PAGE * PAGE for n in CANDIDATES]


def measure(layer: Layer, length: int, wanted: Sequence[tuple[Phase, SelectionPolicy]]) -> Shares:
    """What each policy keeps of DSA's set in every row, directly (but for a sketch) and with each of CANDIDATES.

    Blocks are scored with all heads on the stored keys: to score candidates among them again changes nothing.
    """
    shares: dict[tuple[Phase, SelectionPolicy], list[float]] = {}
    sketches = {bits: layer.sketched(bits) for bits in {policy.sketch for _, policy in wanted if policy.sketch}}
    of_sketches = [layer.rows(length, keys) for keys in sketches.values()]
    for row, *others in zip(layer.rows(length), *of_sketches, strict=True):
        sketched = dict(zip(sketches, others, strict=True))
        for phase, policy in wanted:
            counts = candidate_counts(row.topk) if policy.heads or policy.sketch else []
            scores = row.scores(policy, sketched.get(policy.sketch) if policy.sketch else None)
            for n, share in zip((row.topk, *counts), row.kept(scores, (row.topk, *counts)), strict=True):
                key = phase, policy if n == row.topk else policy.model_copy(update={"candidates": n})
                if n != row.topk or policy.sketch is None:
                    shares.setdefault(key, []).append(share)
    return {key: torch.tensor(values, dtype=torch.float64) for key, values in shares.items()}


@kept_stdout()
def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_misa.bench.selection",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--length", nargs="+", type=at_least(1), default=[], help="keys that a row sees, at most")
    parser.add_argument("--rows", type=at_least(1), default=64, help="rows of each file")
    parser.add_argument("--device", type=device, default="cpu", help="where to compute: cpu or cuda")
    parser.add_argument("--csv", type=file_to_write, help="write the table there")
    parser.add_argument("--plot", type=picture, help="draw recall against cost there (of the first length)")
    options = parser.parse_args(words)
    try:
        lengths = judged(options.files, options.rows, options.length)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    rows: list[dict[str, object]] = []
    for length in lengths:
        shares: dict[str, list[Shares]] = {}
        for path in options.files:
            layer = Layer.load(path, options.rows, options.device)
            shares.setdefault(layer.name, []).append(measure(layer, length, policies()))
            print(f"{path}: {len(layer.positions)} rows of up to {length} keys", file=sys.stderr, flush=True)
        rows += table([together(files) for files in shares.values()], length, layer.index_heads)
    print("  ".join(FIELDS))
    for row in rows:
        print("  ".join(str(row[name]).ljust(len(name)) for name in FIELDS))
    if options.csv is not None:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    if options.plot is not None:
        plot([row for row in rows if row["length"] == lengths[0]], options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
