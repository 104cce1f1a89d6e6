"""The cheapest policy of each layer that keeps the target, chosen on one half of the rows and checked on the other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sglang_misa.bench import selection
from sglang_misa.calibrate.costs import Costs
from sglang_misa.config import PHASES, ConfigError, Phase, SelectionPolicy
from sglang_misa.policy import EXACT, STOCK
from sglang_misa.policy_file import ModelIdentity, Recall

LATE = 0.75  # of the keys that a prompt's last row sees


@dataclass(frozen=True)
class Point:
    """One policy in one layer: what it costs over stock's, and its recall in each row of both halves."""

    policy: SelectionPolicy
    cost: float
    calibrated: Tensor
    held_out: Tensor

    @property
    def recall(self) -> float:
        return float(self.calibrated.mean())

    @property
    def bound(self) -> float:
        """Its recall less one standard error: of many policies the luckiest must not win."""
        return self.recall - float(self.calibrated.std()) / math.sqrt(len(self.calibrated))

    def told(self) -> Recall:
        held_out = round(float(self.held_out.mean()), 4)
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
    dumps: Sequence[Dumped], model: ModelIdentity, costs: Costs, *, length: int, rows: int, device: str
) -> dict[Phase, list[Point]]:
    """Every policy in one layer, measured on its `dumps`. Raises ConfigError for too few rows.

    Prefill is measured on the rows of prompts, decode on those of answers; where there are none, on the rows that see
    nearly a whole prompt, as a decode step does. Prompts are held out by turns; of a single one, rows are.
    """
    wanted = policies(costs, model)
    answered = any(each.answer is not None for each in dumps)
    shares: dict[Phase, list[dict[SelectionPolicy, Tensor]]] = {phase: [] for phase in PHASES}
    for each in dumps:
        told = PHASES if not answered else ("prefill",) if each.answer is None else ("decode",)
        layer = selection.Layer.load(each.path, rows, device)
        measured = selection.measure(layer, length, [kind for kind in wanted if kind[0] in told])
        seen = (layer.positions + 1).clamp(max=length).cpu()
        late = seen >= LATE * seen.max() if each.answer is None else layer.positions.cpu() >= each.answer
        for phase in told:
            chosen = late if phase == "decode" else slice(None)
            shares[phase].append({policy: kept[chosen] for (of, policy), kept in measured.items() if of == phase})
    found: dict[Phase, list[Point]] = {phase: [] for phase in PHASES}
    for phase in dict.fromkeys(phase for phase, _ in wanted):
        halves = {policy: _halves([each[policy] for each in shares[phase]]) for policy in next(iter(shares[phase]), {})}
        chosen_by, held_out = map(len, next(iter(halves.values()), ((), ())))
        if chosen_by < 2 or not held_out:  # of one row no error is known
            raise ConfigError(
                [
                    f"{dumps[0].path}: expected two rows or more of {phase} to choose by and others to hold out, got "
                    f"{chosen_by} and {held_out}; dump more rows, or longer prompts"
                ]
            )
        found[phase] = [
            Point(policy, cost, *rows)
            for policy, rows in halves.items()
            if (cost := costs.of(phase, policy)) is not None and _possible(phase, policy, model)
        ]
    for phase in PHASES:
        for policy in (STOCK, EXACT) if phase == "prefill" else (STOCK,):
            cost = costs.of(phase, policy)
            if cost is not None:
                found[phase].append(Point(policy, cost, torch.ones(2), torch.ones(2)))
    return found


def _halves(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    prompts = [rows for rows in prompts if len(rows)] or [torch.empty(0)]
    if len(prompts) == 1:
        return prompts[0][::2], prompts[0][1::2]
    return torch.cat([*prompts[::2]]), torch.cat([*prompts[1::2]])


def choose(found: Sequence[Point], target: float) -> Point:
    """The cheapest point that surely keeps the target, of equal costs the one that keeps most. DSA is always one."""
    return max((point for point in found if point.bound >= target), key=lambda point: (-point.cost, point.recall))


def sketch_widths(chosen: Mapping[int, Mapping[Phase, Point]]) -> list[int]:
    """The widths of the sketches that layers chose in decode, ascending."""
    widths = (each["decode"].policy.sketch for each in chosen.values())
    return sorted({width for width in widths if width is not None})
