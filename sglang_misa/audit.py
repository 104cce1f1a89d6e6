"""Recall of live selections against the dense indexer, measured on sampled rows of real prefill and decode calls."""

from __future__ import annotations

import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from sglang_misa import decode_gate, reference, reference_pages
from sglang_misa.call import DecodeCall, ExtendCall, Output, Run, Span
from sglang_misa.config import Audit, Phase, SelectionPolicy
from sglang_misa.engines import Engine
from sglang_misa.kernels.layout import PAGE
from sglang_misa.ladder import Ladders
from sglang_misa.metrics import recorder

Result = tuple[float, float, float]  # recall, IoU, score mass of one row
_COPIES = 16  # of a row's scores, that comparing it holds at once


def kept(dense: Tensor, lens: Tensor, output: Output) -> Tensor:
    """Recall, IoU and score mass, each from 0 to 1, of what `output` holds of its T rows: fp64 [T, 3].

    dense fp32 [T, L]: scores of all heads, NaN the worst; lens [T]: the tokens that a row sees, the first of them.
    """
    length = dense.shape[1]
    parts = (slice(*part) for part in reference.row_chunks(len(dense), _COPIES * length))
    return torch.cat([overlap(dense[p], lens[p], _chosen(output.rows(p), length), output.topk) for p in parts])


def _chosen(output: Output, length: int) -> Tensor:
    """Mask [T, length] of the positions that `output` holds."""
    positions = torch.arange(length, device=output.ids.device).expand(len(output.ids), length)
    ids, held = output.of(positions), output.ids.sort(1).values
    place = torch.searchsorted(held, ids).clamp_max_(output.topk - 1)
    return held.gather(1, place) == ids


def overlap(dense: Tensor, lens: Tensor, chosen: Tensor, topk: int) -> Tensor:
    """The same of selections as masks [T, L].

    Recall = |A∩B| / |B| and mass = Σ_A (I - min I) / Σ_B (I - min I), with B the best of the tokens seen, up to topk.
    """
    visible = torch.arange(dense.shape[1], device=dense.device) < lens.unsqueeze(1)
    best = reference.finite(dense, visible).topk(min(topk, dense.shape[1])).indices
    wanted = torch.zeros_like(visible).scatter_(1, best, True) & visible
    chosen = chosen & visible
    least = torch.nan_to_num(dense, *(torch.inf,) * 3).masked_fill_(~visible, torch.inf).amin(1, keepdim=True)
    above = torch.nan_to_num(dense.double() - torch.nan_to_num(least, posinf=0.0), nan=0.0, neginf=0.0)
    sets = torch.stack((wanted, chosen, wanted & chosen, wanted | chosen))
    best_count, _, common, union = sets.sum(2, dtype=torch.float64)
    of_best, of_chosen = (sets[:2] * above).sum(2)
    mass = torch.where(of_best > 0, of_chosen / of_best, 1.0)
    return torch.stack((common / best_count, common / union, mass), 1)


@dataclass
class Auditor:
    """Decides which calls of one pool's layers are audited, and tells the ladders what their rows kept.

    Where a layer has sunk, the policy that it came from selects for the same rows once more, into an output of its own:
    the engine itself runs, so what is broken in it stays seen, and nobody is served by it.
    """

    settings: Audit
    topk: int
    engine: Engine
    ladders: Ladders
    numbers: random.Random = field(default_factory=lambda: random.Random(0))  # that draw rows, in all ranks alike
    _calls: Counter[tuple[Phase, int]] = field(default_factory=Counter)

    def look_at_extend(self, call: ExtendCall, run: Run) -> None:
        """Audit sampled rows of `run`, which the policy selected, if this call of the layer is due."""
        if not self.due("prefill", call.layer):
            return
        results = [self.extend_rows(call, span, rows) for span, rows in self._sampled(run)]
        self.record("prefill", call.layer, _listed(results))
        probe = self.ladders.probe("prefill", call.layer)
        if probe is not None:
            self.probe_extend(call, probe, run)

    def probe_extend(self, call: ExtendCall, policy: SelectionPolicy, run: Run) -> None:
        """Tell the ladder what `policy` would keep of sampled rows of `run`."""
        results = []
        for span, rows in self._sampled(run):
            for row in rows:
                one = call.alone(span, row)
                self.engine.extend(one, [(policy, Run.whole(one.spans))])
                results.append(self.extend_rows(one, one.spans[0], range(1)))
        self.ladders.observe("prefill", call.layer, [recall for recall, _, _ in _listed(results)], probed=True)

    def _sampled(self, run: Run) -> Iterator[tuple[Span, list[int]]]:
        """Rows of `run` to audit, those of one request after another; with no more than k tokens there is no choice."""
        for span, rows in run.by_request():
            first = max(rows.start, span.gate(self.topk))
            if first < rows.stop:
                yield span, self.rows(first, rows.stop)

    def extend_rows(self, call: ExtendCall, span: Span, rows: Sequence[int]) -> Tensor:
        """Results fp64 [n, 3] of some rows of a call, ascending, all of one request."""
        picked = torch.tensor(rows, device=call.output.ids.device)
        keys, k_scale = (part[: span.seen_by(rows[-1])] for part in call.keys(span))
        queries = call.index_q.view(torch.uint8)[picked].view(call.index_q.dtype)  # fp8 has no index kernel
        dense = reference.index_scores(queries[None], call.head_gates[None, picked], keys[None])
        output = replace(call.output.rows(picked), ids=call.output.ids[picked])
        return kept(dense[0] * k_scale, call.seq_lens[picked], output)

    def look_at_decode(self, call: DecodeCall) -> None:
        """Audit rows of a call that is due; while a CUDA graph is captured, leave a tap for its replays."""
        if self.settings.rows == 0:
            return
        capture = decode_gate.capture()
        if capture is not None:
            self._tap(capture, call, self.audit_decode)
        elif self.due("decode", call.layer):
            self.audit_decode(self._drawn(call))

    def audit_decode(self, call: DecodeCall) -> None:
        """Audit the rows of `call`, whose output is written."""
        self.record("decode", call.layer, self.decode_results(call))

    def look_past_decode(self, call: DecodeCall) -> None:
        """The same for a call that stock DSA selects for, whose policy may select again."""
        if self.settings.rows == 0:
            return
        capture = decode_gate.capture()
        if capture is not None:
            self._tap(capture, call, self.probe_decode)
        elif self.ladders.probe("decode", call.layer) is not None and self.due("decode", call.layer):
            self.probe_decode(self._drawn(call))

    def probe_decode(self, call: DecodeCall) -> None:
        """Tell the ladder what the layer's policy would keep for the rows of `call`."""
        probe = self.ladders.probe("decode", call.layer)
        if probe is not None:
            call = replace(call, ids=torch.empty_like(call.ids), positions=True)
            behind = self.engine.behind
            self.engine.decode(call, probe)
            self.engine.behind = behind  # this was no step
            recalls = [recall for recall, _, _ in self.decode_results(call)]
            self.ladders.observe("decode", call.layer, recalls, probed=True)

    def _drawn(self, call: DecodeCall) -> DecodeCall:
        """The call of some of its rows, drawn."""
        return call.at(self.decode_rows(call.seq_lens[: len(call.ids)]))

    def _tap(self, capture: decode_gate.Capture, call: DecodeCall, look: Callable[[DecodeCall], None]) -> None:
        """Leave a tap for `look` in one layer of so many that select: a copy of some rows' queries, made in the graph.

        The page table and the lengths stay in the graph's own buffers, and the pages in the pool, until the next step.
        """
        count = len(call.ids)
        if not torch.cuda.is_current_stream_capturing():  # a warm-up: what is made here, no replay makes anew
            first = torch.arange(min(self.settings.rows, count), device=call.ids.device)
            capture.rows.setdefault(count, first)
            return
        capture.layers += 1
        if (capture.layers - 1) % self.settings.decode_layers == 0:
            rows = capture.rows[count]
            copied = replace(call.queries_at(rows), seq_lens=call.seq_lens[:count])
            capture.taps.append(partial(self._replayed, look, copied, rows))

    def _replayed(self, look: Callable[[DecodeCall], None], copied: DecodeCall, rows: Tensor) -> None:
        """Look at what a replay has copied of its `rows`, and have the next ones copy others."""
        look(copied.steps_at(rows))
        rows.copy_(self.decode_rows(copied.seq_lens))

    def due(self, phase: Phase, layer: int) -> bool:
        """Whether this call of `layer` is to be audited: one of each `every`, another one in neighbouring layers."""
        if self.settings.rows == 0:
            return False
        count = self._calls[phase, layer]
        self._calls[phase, layer] = count + 1
        return _is_picked(count, layer, self.settings.every)

    def rows(self, first: int, last: int) -> list[int]:
        """Evenly spaced rows of [first, last) to audit, from a place that is drawn: each is as likely as another.

        Chunks begin with a page, and as many rows are a power of two: the last of each part would always end a block.
        """
        size = last - first
        count, start = min(self.settings.rows, size), self.numbers.randrange(size)
        return [first + (start + part * size) // count for part in range(count)]

    def decode_rows(self, seq_lens: Tensor) -> Tensor:
        """Rows int64 [n] of a decode call to audit, drawn: others only where too few see more than k tokens."""
        lens = seq_lens.tolist()
        drawn = self.numbers.sample(range(len(lens)), len(lens))
        drawn.sort(key=lambda row: lens[row] <= self.topk)
        return torch.tensor(drawn[: self.settings.rows], device=seq_lens.device)

    def decode_results(self, call: DecodeCall) -> list[Result]:
        """Results of the rows that had more than k tokens to choose from."""
        lens = call.seq_lens.tolist()
        long = [row for row, length in enumerate(lens) if length > self.topk]
        if not long:
            return []
        dense = call.head_gates.new_zeros(len(lens), max(lens), dtype=torch.float32)
        for row in long:  # one after another: their keys in fp32 take most of the room
            pages = call.page_table[row, : -(-lens[row] // PAGE)].long()
            keys, k_scale = (part[: lens[row]] for part in reference_pages.unpack_pages(call.index_k_pages[pages]))
            queries = call.index_q[None, row, None], call.head_gates[None, row, None]
            dense[row, : lens[row]] = reference.index_scores(*queries, keys[None]).flatten() * k_scale
        results = kept(dense, call.seq_lens, call.output).tolist()
        return [results[row] for row in long]

    def record(self, phase: Phase, layer: int, results: Sequence[Result]) -> None:
        """Count the rows' results, and tell the ladder."""
        for recall, iou, mass in results:
            recorder.audited(phase, layer, recall, iou, mass)
        self.ladders.observe(phase, layer, [recall for recall, _, _ in results], probed=False)


@dataclass
class Taps:
    """What one captured graph leaves to look at after its replays; it takes turns, one at a replay of each `every`."""

    looks: Sequence[Callable[[], None]]
    every: int
    _replays: int = 0

    def replayed(self) -> None:
        """Call after each replay of the graph, on its stream."""
        count = self._replays
        self._replays += 1
        if _is_picked(count, 1, self.every):
            self.looks[count // self.every % len(self.looks)]()


def _listed(results: Sequence[Tensor]) -> list[Result]:
    """Results [n, 3] of some rows each, brought to the host at once."""
    return torch.cat(results).tolist() if results else []


def _is_picked(count: int, offset: int, every: int) -> bool:
    """Whether call `count` is the one of its `every` calls to look at, in all ranks alike.

    Another one each time: nothing that has a period, as a prompt's chunks have or the tokens of a page, is in step.
    """
    turn = count // every
    jitter = zlib.crc32(turn.to_bytes(8)) if turn else 0
    return (count + offset + jitter) % every == 0
