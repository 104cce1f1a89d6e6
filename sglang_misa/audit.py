"""Recall of live selections against the dense indexer, measured on sampled rows of real prefill calls."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sglang_misa.config import Audit
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


@dataclass
class Auditor:
    """Decides which calls of one pool's layers are audited, and which layers have sunk below the floor for good."""

    settings: Audit
    dense_layers: set[int] = field(default_factory=set)
    _calls: dict[int, int] = field(default_factory=dict)
    _window: dict[int, list[float]] = field(default_factory=dict)

    def due(self, layer: int) -> bool:
        """Whether this call of `layer` is one to audit: one in `every`, not the same one in neighbouring layers."""
        if self.settings.rows == 0:
            return False
        count = self._calls.get(layer, 0)
        self._calls[layer] = count + 1
        return (count + layer) % self.settings.every == 0

    def rows(self, first: int, last: int) -> list[int]:
        """Evenly spread rows of [first, last) to audit, the last one always among them."""
        count = min(self.settings.rows, last - first)
        return sorted({last - 1 - (last - first) * i // count for i in range(count)}) if count else []

    def record(self, layer: int, results: list[tuple[float, float, float]]) -> None:
        """Add the rows' (recall, IoU, mass); act when the mean of the layer's last WINDOW rows is under the floor."""
        for recall, iou, mass in results:
            recorder.audited(layer, recall, iou, mass)
        window = self._window.setdefault(layer, [])
        window += [recall for recall, _, _ in results]
        if len(window) < WINDOW:
            return
        mean = sum(window) / len(window)
        window.clear()
        if mean >= self.settings.floor or layer in self.dense_layers:
            return
        sinking = (
            f"layer {layer}: mean recall {mean:.3f} over the last {WINDOW} audited rows is under {self.settings.floor}"
        )
        if self.settings.action == "dense":
            self.dense_layers.add(layer)
            recorder.layer_dense(layer)
            logger.warning("%s; stock DSA selects for this layer until restart", sinking)
        else:
            logger.warning("%s; raise --misa-prefill-heads or set --misa-prefill-candidates", sinking)
