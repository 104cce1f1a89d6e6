"""Recall of live selections against the dense indexer, measured on sampled rows of real prefill and decode calls."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sglang_misa import decode_gate, reference
from sglang_misa.call import DecodeCall, ExtendCall, Output, Run
from sglang_misa.config import Audit, Phase
from sglang_misa.kernels.layout import HEAD_DIM, PAGE
from sglang_misa.metrics import recorder

logger = logging.getLogger(__name__)

WINDOW = 64  # audited rows that are judged together: one bad row is no trend


def overlap(dense: Tensor, chosen: Tensor, topk: int) -> tuple[float, float, float]:
    """Recall, IoU and score mass kept of one row's selection.

    dense [L]: scores of all heads over the visible tokens; chosen [L]: mask of the tokens selected.
    Recall = |A∩B| / k and mass = Σ_A I / Σ_B I, with B the dense top k (k = min(topk, L)).
    """
    best = dense.topk(min(topk, dense.numel())).indices
    wanted = torch.zeros_like(chosen).scatter_(0, best, True)
    common = (wanted & chosen).sum().item()
    total = dense[wanted].sum().item()
    mass = dense[chosen].sum().item() / total if total else 1.0
    return common / best.numel(), common / max(1, int((wanted | chosen).sum().item())), mass


Result = tuple[float, float, float]  # recall, IoU, score mass of one row


@dataclass
class Auditor:
    """Decides which calls of one pool's layers are audited, and which layers have sunk below the floor for good."""

    settings: Audit
    topk: int
    dense_layers: set[int] = field(default_factory=set)
    _calls: Counter[tuple[Phase, int]] = field(default_factory=Counter)
    _window: dict[tuple[Phase, int], list[float]] = field(default_factory=dict)

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

    def look_at_decode(self, call: DecodeCall) -> None:
        """Audit the first rows of a call that is due; while a CUDA graph is captured, leave a tap for its replays."""
        if self.settings.rows == 0:
            return
        capture = decode_gate.capture()
        if capture is None:
            if self.due("decode", call.layer):
                self.record("decode", call.layer, self.decode_rows(call))
        elif torch.cuda.is_current_stream_capturing() and call.layer % self.settings.decode_layers == 0:
            rows = slice(0, self.settings.rows)
            copies = call.index_q[rows].clone(), call.head_gates[rows].clone(), call.ids[rows].clone()
            capture.taps.append(Tap(self, call, *copies))

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
        """Add the rows' results; act when the mean of the layer's last WINDOW rows is under the floor."""
        for recall, iou, mass in results:
            recorder.audited(phase, layer, recall, iou, mass)
        window = self._window.setdefault((phase, layer), [])
        window += [recall for recall, _, _ in results]
        if len(window) < WINDOW:
            return
        mean = sum(window) / len(window)
        window.clear()
        if mean >= self.settings.floor or layer in self.dense_layers:
            return
        sinking = (
            f"layer {layer}: mean recall {mean:.3f} of {phase} over the last {WINDOW} audited rows is under "
            f"{self.settings.floor}"
        )
        if self.settings.action == "dense":
            self.dense_layers.add(layer)
            recorder.layer_dense(layer)
            logger.warning("%s; stock DSA selects its prefill until restart", sinking)
        else:
            logger.warning("%s; choose the preset faithful, or raise --misa-%s-candidates", sinking, phase)


@dataclass(frozen=True)
class Tap:
    """Copies that a CUDA graph makes of what the first rows of one layer's call selected with, and what they got.

    The page table and the lengths stay in the graph's own buffers, and the pages in the pool, until the next step.
    """

    auditor: Auditor
    call: DecodeCall
    index_q: Tensor
    head_gates: Tensor
    ids: Tensor

    def audit(self) -> None:
        call = replace(self.call, index_q=self.index_q, head_gates=self.head_gates, ids=self.ids)
        self.auditor.record("decode", call.layer, self.auditor.decode_rows(call))


@dataclass
class Taps:
    """The taps of one captured graph; they take turns, one at a replay in `every`."""

    taps: Sequence[Tap]
    _replays: int = 0

    def replayed(self) -> None:
        """Call after each replay of the graph, on its stream."""
        self._replays += 1
        turn, rest = divmod(self._replays, self.taps[0].auditor.settings.every)
        if rest == 0:
            self.taps[turn % len(self.taps)].audit()
