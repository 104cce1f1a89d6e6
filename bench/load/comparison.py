"""Comparison of two earlier runs, as two arms of one run, where both measured the same cells and prompts."""

from __future__ import annotations

from pathlib import Path

from sglang_misa.bench.load import gates
from sglang_misa.bench.load.figures import under
from sglang_misa.bench.load.plan import Arm, Plan
from sglang_misa.bench.load.records import Unit, check_compared
from sglang_misa.bench.load.safety import Keys
from sglang_misa.bench.load.settings import LoadError
from sglang_misa.bench.load.store import Store

Units = dict[tuple[str, int], Unit]  # by cell and block


def comparison(
    folders: tuple[Path, Path], arms: tuple[str, str] | None, out: Path, fail_if: tuple[str, ...], primary: str
) -> tuple[Plan, list[Unit]]:
    """Plan and units of a run whose arms are those of two `folders`; by default the last of each. Raises LoadError.

    What only one of the two has measured, and measured validly, is left out; a note says how much that is.
    """
    check_compared(primary)
    gates.check(fail_if, ratios=True)
    if (out / "plan.json").exists():
        raise LoadError(f"out: expected a folder without a run, got {out}, whose report it would replace; name another")
    plans = [Store.plan_in(folder) for folder in folders]
    chosen = arms or (plans[0].arms[-1].name, plans[1].arms[-1].name)
    notes = ["the two runs were not interleaved: drift of the machine between them counts as difference"]
    if plans[0].protocol != plans[1].protocol:
        notes.append(f"the two runs asked differently: {plans[0].protocol.api} and {plans[1].protocol.api}")
    alike = folders[0].resolve().name == folders[1].resolve().name
    sides: list[tuple[str, Units]] = []
    for folder, plan, arm in zip(folders, plans, chosen, strict=True):
        _check_folder(folder, plan, arm)
        name = f"{arm} ({folder if alike else folder.resolve().name})"
        sides.append((name, _valid_units(folder, arm, name)))
    if sides[0][0] == sides[1][0]:
        raise LoadError(f"compare: expected two folders or two arms, got {sides[0][0]} twice; name another")
    common = sides[0][1].keys() & sides[1][1].keys()
    if not common:
        raise LoadError(
            "compare: expected valid cells with equal workload, load and seed in both folders, got none in common; "
            "measure both with the same options"
        )
    for name, units in sides:
        if alone := len(units.keys() - common):
            notes.append(f"{alone} of {len(units)} valid blocks of {name} have no valid counterpart and are left out")
    cells = tuple(c for c in plans[0].cells if any(c.digest() == digest for digest, _ in common))
    judged = (under(units[key], plans[0].slo) for _, units in sides for key in common)
    return (
        plans[0].model_copy(
            update={
                "arms": tuple(Arm(name=name, server=str(f)) for (name, _), f in zip(sides, folders, strict=True)),
                "cells": cells,
                "blocks": len({block for _, block in common}),
                "fail_if": fail_if,
                "primary": primary,
            }
        ),
        [
            u.model_copy(update={"notes": (*u.notes, *notes)})
            for u in sorted(judged, key=lambda u: (u.block, u.started))
        ],
    )


def _check_folder(folder: Path, plan: Plan, arm: str) -> None:
    if plan.search is not None:
        raise LoadError(f"{folder}: expected a `run`, `sweep` or `ab`, got a search; use `max --against`")
    if arm not in (names := [a.name for a in plan.arms]):
        raise LoadError(f"arms: expected {' or '.join(names)} for {folder}, got {arm}; name one of them")


def _valid_units(folder: Path, arm: str, name: str) -> Units:
    """Units of `arm`, which is called `name` from now on."""
    found = [u for u in Store(folder, Keys()).units() if u.arm == arm and not u.problems]
    return {(u.cell, u.block): u.model_copy(update={"arm": name}) for u in found}
