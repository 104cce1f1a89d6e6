"""The cheapest policy of each layer that keeps the target, chosen on one half of the rows and checked on the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sglang_misa.bench import selection
from sglang_misa.calibrate.costs import Costs
from sglang_misa.config import PHASES, ConfigError, Phase, SelectionPolicy
from sglang_misa.policy_file import ModelIdentity, Recall

DSA = SelectionPolicy()
EXACT = SelectionPolicy(exact=True)
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
        rows = len(self.calibrated)
        return self.recall - (float(self.calibrated.std()) / rows**0.5 if rows > 1 else 0.0)

    def told(self) -> Recall:
        held_out = round(float(self.held_out.mean()), 4)
        return Recall(calibrated=round(self.recall, 4), held_out=held_out, cost=round(self.cost, 4))


def candidates(costs: Costs, model: ModelIdentity) -> list[tuple[Phase, SelectionPolicy]]:
    """The policies of the study with a cost, and that the model can have; without candidates, which `measure` adds."""
    found = []
    for phase, policy in selection.policies():
        counts = [n * model.index_topk for n in selection.CANDIDATES]
        variants = [policy, *(policy.model_copy(update={"candidates": n}) for n in counts)]
        if any(_possible(phase, each, model) and costs.of(phase, each) is not None for each in variants):
            found.append((phase, policy))
    return found


def _possible(phase: Phase, policy: SelectionPolicy, model: ModelIdentity) -> bool:
    return not any(policy.problems(phase, index_heads=model.index_heads, topk=model.index_topk))


def points(
    files: Sequence[Path], model: ModelIdentity, costs: Costs, *, length: int, rows: int, device: str
) -> dict[Phase, list[Point]]:
    """Every candidate in one layer, measured on its `files` (a prompt each). Raises ConfigError for too few rows.

    Prompts are held out by turns; of a single one, rows are. A decode step sees the whole prompt, so decode is measured
    on the rows that see nearly as much.
    """
    wanted = candidates(costs, model)
    shares, late = [], []
    for path in files:
        layer = selection.Layer.load(path, rows, device)
        shares.append(selection.measure(layer, length, wanted))
        seen = (layer.positions + 1).clamp(max=length).cpu()
        late.append(seen >= LATE * seen.max())
    if sum(map(int, map(torch.sum, late))) < 2:
        raise ConfigError([f"{files[0]}: expected two late rows or more, to hold one out, got fewer; dump more rows"])
    found: dict[Phase, list[Point]] = {phase: [] for phase in PHASES}
    for phase, policy in shares[0]:
        cost = costs.of(phase, policy)
        if cost is not None and _possible(phase, policy, model):
            kept = [each[phase, policy] for each in shares]
            if phase == "decode":
                kept = [part[chosen] for part, chosen in zip(kept, late, strict=True)]
            found[phase].append(Point(policy, cost, *_halves(kept)))
    for phase in PHASES:
        for policy in (DSA, EXACT) if phase == "prefill" else (DSA,):
            cost = costs.of(phase, policy)
            if cost is not None:
                found[phase].append(Point(policy, cost, torch.ones(1), torch.ones(1)))
    return found


def _halves(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
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
