"""Which policy a layer has now: its own, or a more faithful one while its audited recall is under the floor.

A ladder's rungs go from the layer's own policy over `faithful` (prefill) to stock DSA. Prefill has a ladder a layer.
Decode has one for the whole step, as its length gate: a CUDA graph holds every layer, so its last rung is the stock
graph. Ranks of one tensor-parallel group must select alike, so they judge the sums of their audits, all in one step.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import distributed

from sglang_misa import decode_gate
from sglang_misa.config import PHASES, PRESETS, MisaConfig
from sglang_misa.metrics import recorder
from sglang_misa.policy import STOCK, Phase, SelectionPolicy

logger = logging.getLogger(__name__)

WINDOW = 64  # audited rows of a layer that are judged together: one bad row is no trend
CALM = 2  # windows over which the rung before must keep enough, before it selects again
MARGIN = 0.01  # of recall over the floor that counts as enough: a layer at the floor stays where it is


class Observed(NamedTuple):
    """Rows of a layer that were audited, and the sum of their recalls."""

    rows: float = 0.0
    recall: float = 0.0

    def plus(self, rows: float, recall: float) -> Observed:
        return Observed(self.rows + rows, self.recall + recall)

    @property
    def mean(self) -> float:
        return self.recall / self.rows


@dataclass
class Ladder:
    """The rungs of one layer's prefill, or of all layers' decode steps, and the one in use."""

    phase: Phase
    layers: range
    rungs: tuple[SelectionPolicy, ...]
    at: int = 0
    served: dict[int, Observed] = field(default_factory=dict)  # by layer: of the rung in use
    probed: dict[int, Observed] = field(default_factory=dict)  # of the rung before it
    low: frozenset[int] = frozenset()  # layers under the floor there, of which full windows must tell otherwise

    @property
    def policy(self) -> SelectionPolicy:
        return self.rungs[self.at]

    @property
    def where(self) -> str:
        """The number of its layer, or "all"."""
        return str(self.layers[0]) if self.phase == "prefill" else "all"

    def judge(self, floor: float) -> str | None:
        """Take the next rung, or the one before, when full windows say so; returns what to tell of it."""
        return self._sink(floor) or self._rise(floor)

    def _sink(self, floor: float) -> str | None:
        full = {layer: seen for layer, seen in self.served.items() if seen.rows >= WINDOW}
        for layer in full:
            del self.served[layer]
        low = [layer for layer, seen in full.items() if seen.mean < floor]
        if not low or self.at + 1 == len(self.rungs):
            return None
        self._move(+1)
        self.low = frozenset(low)
        seen = full[low[0]]
        return (
            f"layer {low[0]}: mean recall {seen.mean:.3f} of {self.phase} over {seen.rows:.0f} audited rows is under "
            f"{floor}; {self.policy.name} selects instead of {self.rungs[self.at - 1].name}"
        )

    def _rise(self, floor: float) -> str | None:
        """Rows of other layers count too, however few: not every step audits every layer."""
        probed = {layer for layer, seen in self.probed.items() if seen.rows >= CALM * WINDOW}
        if self.at == 0 or not self.low <= probed:
            return None
        lowest = min(seen.mean for seen in self.probed.values())
        self.probed.clear()
        if lowest < min(floor + MARGIN, 1.0):
            return None
        self._move(-1)
        return f"layer {self.where}: {self.phase} by {self.policy.name} keeps {lowest:.3f} again; it selects once more"

    def _move(self, step: int) -> None:
        self.at += step
        self.served.clear()
        self.probed.clear()


class Ladders:
    """The ladders of one KV pool's layers, and what is observed for them until the ranks meet."""

    def __init__(self, config: MisaConfig, layers: Sequence[int | None], *, index_heads: int, topk: int, peers: Any):
        """`layers`: the model's layer that each layer of the pool is, None for a draft model's, which have no floor.

        peers: the process group of the ranks that have to agree, None for a rank of its own.
        """
        self.floor = 0.0 if None in layers else config.audit.floor
        self.every, self.peers = config.audit.every, peers
        model = {"index_heads": index_heads, "topk": topk}
        prefill = [rungs(config.policy("prefill", layer), self.floor, **model) for layer in layers]
        self._prefill = [Ladder("prefill", range(i, i + 1), each) for i, each in enumerate(prefill)]
        self._decode = tuple(config.policy("decode", layer) for layer in layers)
        first = next((policy for policy in self._decode if policy.active), STOCK)
        guarded = self.floor > 0 and first.active
        self._step = Ladder("decode", range(len(layers)), (first, STOCK) if guarded else (first,))
        for ladder in (*self._prefill, self._step):
            if len(ladder.rungs) > 1:
                recorder.guarded(ladder.phase, ladder.where, ladder.rungs)
        self._observed = torch.zeros(len(PHASES), len(layers), 2, 2, dtype=torch.float64)
        self._steps = 0

    @property
    def decodes(self) -> bool:
        """Whether any layer has a decode policy."""
        return any(policy.active for policy in self._decode)

    def policy(self, phase: Phase, layer: int) -> SelectionPolicy:
        """What selects in `layer` now. In decode the step's gate may name stock DSA in its place."""
        return self._prefill[layer].policy if phase == "prefill" else self._decode[layer]

    def sunk(self, layer: int) -> bool:
        """Whether the layer's prefill is not by its own policy."""
        return self._prefill[layer].at > 0

    def probe(self, phase: Phase, layer: int) -> SelectionPolicy | None:
        """The policy that would select again if its recall were enough; None where nothing has sunk."""
        if phase == "decode":
            policy = self._decode[layer]
            return policy if self._step.at > 0 and policy.active else None
        ladder = self._prefill[layer]
        return ladder.rungs[ladder.at - 1] if ladder.at > 0 else None

    def observe(self, phase: Phase, layer: int, recalls: Sequence[float], *, probed: bool) -> None:
        """Recalls of a layer's audited rows: as they were served, or (`probed`) as `probe` would have served them."""
        self._observed[PHASES.index(phase), layer, int(probed)] += torch.tensor(
            [len(recalls), sum(recalls)], dtype=torch.float64
        )

    def stepped(self) -> None:
        """Call once a step, in every rank alike: once in `every` steps the ranks meet and judge."""
        if self.floor == 0:
            return
        self._steps += 1
        if self._steps % self.every == 0:
            self.meet()

    def meet(self) -> None:
        """Sum up what all peers observed since the last time, and judge: every rank comes to the same end."""
        if self.peers is not None:
            distributed.all_reduce(self._observed, group=self.peers)
            self._observed /= distributed.get_world_size(self.peers)
        observed = dict(zip(PHASES, self._observed.tolist(), strict=True))
        for ladder in (*self._prefill, self._step):
            for layer in ladder.layers:
                both = zip((ladder.served, ladder.probed), observed[ladder.phase][layer], strict=True)
                for kept, (rows, recall) in both:
                    if rows > 0:
                        kept[layer] = kept.get(layer, Observed()).plus(rows, recall)
            if told := ladder.judge(self.floor):
                logger.warning("%s", told)
                recorder.moved(ladder.phase, ladder.where, ladder.at, ladder.policy)
        self._observed.zero_()
        decode_gate.suspend(self._step.at > 0)


def rungs(policy: SelectionPolicy, floor: float, *, index_heads: int, topk: int) -> tuple[SelectionPolicy, ...]:
    """A prefill policy and, with a floor, what comes after it: faithful, where that keeps more and can be, then DSA."""
    if floor == 0 or not policy.active:
        return (policy,)
    faithful = PRESETS["faithful"].prefill
    more = faithful.model_copy(update={"min_len": policy.min_len, "tail": max(policy.tail, faithful.tail)})
    rescored = policy.residual and policy.blocks is None and (policy.candidates or 0) >= (more.candidates or 0)
    impossible = any(more.problems("prefill", index_heads=index_heads, topk=topk))
    return (policy, STOCK) if policy.exact or rescored or impossible else (policy, more, STOCK)
