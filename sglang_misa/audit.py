"""Recall of live selections against the dense indexer, measured on sampled rows of real prefill and decode calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sglang_misa import decode_gate, reference
from sglang_misa.call import DecodeCall, ExtendCall, Output, Run
from sglang_misa.config import Audit, Phase, SelectionPolicy
from sglang_misa.engines import Engine
from sglang_misa.kernels.layout import HEAD_DIM, PAGE
from sglang_misa.ladder import Ladders
from sglang_misa.metrics import recorder


def overlap(dense: Tensor, chosen: Tensor, topk: int) -> tuple[float, float, float]:
    """Recall, IoU and score mass kept of one row's selection, each from 0 to 1.

    dense [L]: scores of all heads over the visible tokens, NaN the worst; chosen [L]: mask of the tokens selected.
    Recall = |A∩B| / k and mass = Σ_A (I - min I) / Σ_B (I - min I), with B the dense top k (k = min(topk, L)).
    """
    finite = dense[dense.isfinite()]
    above = torch.nan_to_num(dense.double() - (finite.min() if len(finite) else 0.0), nan=0.0, neginf=0.0)
    best = torch.nan_to_num(dense, nan=-torch.inf, neginf=-torch.inf).topk(min(topk, dense.numel())).indices
    wanted = torch.zeros_like(chosen).scatter_(0, best, True)
    common = (wanted & chosen).sum().item()
    total = above[wanted].sum().item()
    mass = above[chosen].sum().item() / total if total else 1.0
    return common / best.numel(), common / max(1, int((wanted | chosen).sum().item())), mass


Result = tuple[float, float, float]  # recall, IoU, score mass of one row


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
    _calls: Counter[tuple[Phase, int]] = field(default_factory=Counter)

    def look_at_extend(self, call: ExtendCall, runs: Sequence[Run]) -> None:
        """Audit sampled rows of `runs`, those that the policy selected, if this call of the layer is due."""
        if not self.due("prefill", call.layer):
            return
        results = []
        for part in (part for run in runs for part in run.alone()):
            (span,), keys = part.spans, None
            for row in self.rows(part.first, part.last):
                keys = call.keys(span) if keys is None else keys
                output = call.output.rows(slice(row, row + 1))
                seen = keys[: span.seen_by(row)]
                results.append(self._row(call.index_q[row], call.head_gates[row], seen, output))
        self.record("prefill", call.layer, results)
        probe = self.ladders.probe("prefill", call.layer)
        if probe is not None:
            self.probe_extend(call, probe, runs)

    def probe_extend(self, call: ExtendCall, policy: SelectionPolicy, runs: Sequence[Run]) -> None:
        """Tell the ladder what `policy` would keep of sampled rows of `runs`."""
        recalls = [
            self._probe_row(call.alone(part.spans[0], row), policy)
            for run in runs
            for part in run.alone()
            for row in self.rows(part.first, part.last)
        ]
        self.ladders.observe("prefill", call.layer, recalls, probed=True)

    def _probe_row(self, one: ExtendCall, policy: SelectionPolicy) -> float:
        self.engine.extend(one, [(policy, Run(one.spans, 0, 1))])
        return self._row(one.index_q[0], one.head_gates[0], one.keys(one.spans[0]), one.output)[0]

    def look_at_decode(self, call: DecodeCall) -> None:
        """Audit the first rows of a call that is due; while a CUDA graph is captured, leave a tap for its replays."""
        if self.settings.rows == 0:
            return
        capture = decode_gate.capture()
        if capture is None:
            if self.due("decode", call.layer):
                self.record("decode", call.layer, self.decode_rows(call))
        elif self._taps(call):
            rows = slice(0, self.settings.rows)
            copies = {name: getattr(call, name)[rows].clone() for name in ("index_q", "head_gates", "ids")}
            capture.taps.append(Tap(self, replace(call, **copies)))

    def look_past_decode(self, call: DecodeCall) -> None:
        """The same for a call that stock DSA selects for, whose policy may select again."""
        if self.settings.rows == 0 or self.settings.floor == 0:
            return
        capture = decode_gate.capture()
        if capture is None:
            if self.ladders.probe("decode", call.layer) is not None and self.due("decode", call.layer):
                self.probe_decode(call.first(self.settings.rows))
        elif self._taps(call):
            first = call.first(self.settings.rows)
            copies = {name: getattr(first, name).clone() for name in ("index_q", "head_gates")}
            capture.taps.append(ProbeTap(self, replace(first, **copies)))

    def _taps(self, call: DecodeCall) -> bool:
        return torch.cuda.is_current_stream_capturing() and call.layer % self.settings.decode_layers == 0

    def probe_decode(self, call: DecodeCall) -> None:
        """Tell the ladder what the layer's policy would keep for the rows of `call`, whose output is written."""
        probe = self.ladders.probe("decode", call.layer)
        if probe is not None:
            behind = self.engine.behind
            self.engine.decode(call, probe)
            self.engine.behind = behind  # this was no step
            recalls = [recall for recall, _, _ in self.decode_rows(call)]
            self.ladders.observe("decode", call.layer, recalls, probed=True)

    def due(self, phase: Phase, layer: int) -> bool:
        """Whether this call of `layer` is one to audit: one in `every`, not the same one in neighbouring layers."""
        if self.settings.rows == 0:
            return False
        count = self._calls[phase, layer]
        self._calls[phase, layer] = count + 1
        return (count + layer) % self.settings.every == 0

    def rows(self, first: int, last: int) -> list[int]:
        """Evenly spread rows of [first, last) to audit, the last one always among them."""
        count = min(self.settings.rows, last - first)
        return sorted({last - 1 - (last - first) * i // count for i in range(count)}) if count else []

    def decode_rows(self, call: DecodeCall) -> list[Result]:
        """Results of the first rows that had more than k tokens to choose from."""
        results = []
        for row, length in enumerate(call.seq_lens[: len(call.ids)][: self.settings.rows].tolist()):
            if length <= self.topk:
                continue
            pages = call.page_table[row, : -(-length // PAGE)].long()
            keys = reference.dequantize_pages(call.index_k_pages[pages]).reshape(-1, HEAD_DIM)[:length]
            table = None if call.positions else call.page_table[row : row + 1]
            output = Output(call.ids[row : row + 1], table, None if table is None else table.new_zeros(1))
            results.append(self._row(call.index_q[row], call.head_gates[row], keys, output))
        return results

    def _row(self, index_q: Tensor, head_gates: Tensor, keys: Tensor, output: Output) -> Result:
        """Result of one row: index_q [H, 128], head_gates [H], keys fp32 [L, 128]; `output` holds its selection."""
        dense = reference.index_scores(index_q[None, None], head_gates[None, None], keys[None]).flatten()
        positions = torch.arange(len(keys), device=keys.device).unsqueeze(0)
        chosen = torch.isin(output.of(positions).flatten(), output.ids.flatten())
        return overlap(dense, chosen, self.topk)

    def record(self, phase: Phase, layer: int, results: Sequence[Result]) -> None:
        """Count the rows' results, and tell the ladder."""
        for recall, iou, mass in results:
            recorder.audited(phase, layer, recall, iou, mass)
        self.ladders.observe(phase, layer, [recall for recall, _, _ in results], probed=False)


@dataclass(frozen=True)
class Tap:
    """Copies that a CUDA graph makes of what the first rows of one layer's call selected with, and what they got.

    The page table and the lengths stay in the graph's own buffers, and the pages in the pool, until the next step.
    """

    auditor: Auditor
    call: DecodeCall  # of the copies

    def audit(self) -> None:
        self.auditor.record("decode", self.call.layer, self.auditor.decode_rows(self.call))


@dataclass(frozen=True)
class ProbeTap:
    """The same of a graph of stock DSA: what its first rows selected with, for the policy that may select again."""

    auditor: Auditor
    call: DecodeCall  # of the copies

    def audit(self) -> None:
        self.auditor.probe_decode(self.call)


@dataclass
class Taps:
    """The taps of one captured graph; they take turns, one at a replay in `every`."""

    taps: Sequence[Tap | ProbeTap]
    _replays: int = 0

    def replayed(self) -> None:
        """Call after each replay of the graph, on its stream."""
        self._replays += 1
        turn, rest = divmod(self._replays, self.taps[0].auditor.settings.every)
        if rest == 0:
            self.taps[turn % len(self.taps)].audit()
