"""The cheapest policy of each layer that keeps the target, chosen on one half of the rows and checked on the other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sglang_misa.bench import selection
from sglang_misa.bench.selection_table import Shares
from sglang_misa.calibrate.costs import Costs
from sglang_misa.config import PHASES, Phase, SelectionPolicy
from sglang_misa.policy import EXACT, STOCK
from sglang_misa.policy_file import ModelIdentity, Recall

LATE = 0.75  # of the keys that a prompt's last row sees
LEAST = 3  # rows of a phase in one layer: two to choose by, as one alone has no error, and one to hold out
DSA = (STOCK, EXACT)  # keep all by definition


@dataclass(frozen=True)
class Point:
    """One policy in one layer: what it costs over stock's, and its recall in the rows of each prompt of both halves."""

    policy: SelectionPolicy
    cost: float
    calibrated: Sequence[Tensor]
    held_out: Sequence[Tensor]

    @property
    def rows(self) -> str:
        """How many rows chose it and were held out."""
        return (
            ""
            if self.policy in DSA
            else "+".join(str(sum(map(len, half))) for half in (self.calibrated, self.held_out))
        )

    @property
    def recall(self) -> float:
        return float(torch.cat([*self.calibrated]).mean())

    @property
    def error(self) -> float:
        """The standard error of its recall: over rows, or over prompts where that is more, as rows of one are alike."""
        rows, prompts = torch.cat([*self.calibrated]), len(self.calibrated)
        of_rows = float(rows.std()) / math.sqrt(len(rows))
        if prompts == 1:
            return of_rows
        off = torch.stack([(each - rows.mean()).sum() for each in self.calibrated])
        return max(of_rows, float(off.norm()) / len(rows) * math.sqrt(prompts / (prompts - 1)))

    @property
    def bound(self) -> float:
        """Its recall less one standard error: of many policies the luckiest must not win."""
        return self.recall - self.error

    def told(self) -> Recall:
        held_out = round(float(torch.cat([*self.held_out]).mean()), 4)
        return Recall(calibrated=round(self.recall, 4), held_out=held_out, cost=round(self.cost, 4))


def policies(costs: Costs, model: ModelIdentity) -> list[tuple[Phase, SelectionPolicy]]:
    """The policies of the study with a cost, and that the model can have; without candidates, which `measure` adds."""
    found = []
    for phase, policy in selection.policies():
        counts = selection.candidate_counts(model.index_topk)
        variants = [policy, *(policy.model_copy(update={"candidates": n}) for n in counts)]
        if any(_possible(phase, each, model) and costs.of(phase, each) is not None for each in variants):
            found.append((phase, policy))
    return found


def _possible(phase: Phase, policy: SelectionPolicy, model: ModelIdentity) -> bool:
    return not any(policy.problems(phase, index_heads=model.index_heads, topk=model.index_topk))


@dataclass(frozen=True)
class Dumped:
    """A dumped prompt in one layer. answer: position of its first generated token, if it ends with an answer."""

    path: Path
    answer: int | None = None


def points(
    dumps: Sequence[Dumped],
    model: ModelIdentity,
    costs: Costs,
    gates: Mapping[Phase, SelectionPolicy],
    *,
    length: int,
    rows: int,
    device: str,
) -> dict[Phase, list[Point]]:
    """Every policy in one layer, measured on its `dumps`; DSA alone in a phase without LEAST rows to measure.

    Prefill is measured on the rows of prompts, decode on those of answers; where there are none, on the rows that see
    nearly a whole prompt, as a decode step does. Rows that the policy would leave to stock DSA by its gate or tail do
    not count. gates: what every policy of a phase has of both.
    """
    wanted = policies(costs, model)
    answered = any(each.answer is not None for each in dumps)
    marks: list[list[bytes]] = []
    groups: list[int] = []
    shares: dict[Phase, list[tuple[int, Shares]]] = {phase: [] for phase in PHASES}
    for each in dumps:
        layer = selection.Layer.load(each.path, rows, device)
        marks.append(_marks(layer))
        groups.append(_group(marks, groups))
        for phase in PHASES if not answered else PHASES[:1] if each.answer is None else PHASES[1:]:
            part = layer.at(_selected(layer, phase, gates[phase], each.answer, length))
            if len(part.positions):
                shares[phase].append(
                    (groups[-1], selection.measure(part, length, [k for k in wanted if k[0] == phase]))
                )
    found: dict[Phase, list[Point]] = {}
    for phase, parts in shares.items():
        count = sum(len(next(iter(kept.values()), ())) for _, kept in parts)
        possible = [policy for _, policy in parts[0][1] if _possible(phase, policy, model)] if count >= LEAST else []
        measured = {policy: halves([(group, kept[phase, policy]) for group, kept in parts]) for policy in possible}
        measured |= dict.fromkeys(DSA if phase == "prefill" else DSA[:1], ([torch.ones(2)], [torch.ones(1)]))
        priced = [(policy, costs.of(phase, policy), both) for policy, both in measured.items()]
        found[phase] = [Point(policy, cost, *both) for policy, cost, both in priced if cost is not None]
    return found


def _selected(layer: selection.Layer, phase: Phase, gate: SelectionPolicy, answer: int | None, length: int) -> Tensor:
    """Mask [rows] of what a policy with the gate and the tail of `gate` would select in `phase`."""
    seen = layer.positions + 1 - layer.starts(length)
    if phase == "prefill":
        return (seen > gate.min_len) & (layer.positions < len(layer.keys) - gate.tail)
    return (seen > gate.min_len) & (seen >= LATE * seen.max() if answer is None else layer.positions >= answer)


def _marks(layer: selection.Layer) -> list[bytes]:
    """Pages 0, 1, 3, 7, … of a prompt's keys: of two prompts, the shorter one's last lies in its second half."""
    return [bytes(layer.pages[(1 << i) - 1].tolist()) for i in range(len(layer.pages).bit_length())]


def _group(marks: Sequence[Sequence[bytes]], groups: Sequence[int]) -> int:
    """The group of the last prompt: that of one which shares most of the shorter one's keys with it, or a new one.

    A later turn of a conversation does, and a prompt that was sent again behind its answer.
    """
    *others, own = marks
    for other, group in zip(others, groups, strict=True):
        last = min(len(own), len(other)) - 1
        if own[last] == other[last]:
            return group
    return len(others)


def halves(prompts: Sequence[tuple[int, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """Rows of prompts with their groups in two halves, of which the second is held out, each group in one of them.

    The longest come first, each to the half that has fewer rows. Prompts of one group are halved as if they were
    several, and the rows of one prompt by turns.
    """
    if len(prompts) == 1:
        return [prompts[0][1][::2]], [prompts[0][1][1::2]]
    groups = [group for group, _ in prompts]
    alone = len({*groups}) == 1
    together: dict[int, list[Tensor]] = {}
    for number, (group, rows) in enumerate(prompts):
        together.setdefault(number if alone else group, []).append(rows)
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for rows in sorted(map(torch.cat, together.values()), key=len, reverse=True):
        min(found, key=lambda half: sum(map(len, half))).append(rows)
    return found


def choose(found: Sequence[Point], target: float) -> Point:
    """The cheapest point whose bound is the target, of equal costs the one that keeps most. DSA is always one."""
    return max((point for point in found if point.bound >= target), key=lambda point: (-point.cost, point.recall))
