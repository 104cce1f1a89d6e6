"""Sections of the report: from answers to rows and a summary sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang_misa.bench.load.plan import Arm
from sglang_misa.bench.load.settings import LoadError
from sglang_misa.bench.load.stats import wilson
from sglang_misa.bench.quality import measures
from sglang_misa.bench.quality.asking import Answer
from sglang_misa.bench.quality.collect import Asked, Collector
from sglang_misa.bench.quality.measures import Audit
from sglang_misa.bench.quality.page import Row, Section, Table, heatmaps

CAN_READ = 0.5  # share of needles that the first arm must find before anything is said of the others
NEVER = 0.05  # level of the sign test
LEAST = 6  # needles that the first arm must find for a loss of all to be significant: two sides of 1 / 2 ** 6


def needles(asked: Sequence[Asked], arms: Sequence[Arm], models: Mapping[str, str], commit: str) -> Section:
    """Found of asked by arm, length and depth, and an exact sign test of each arm against the first."""
    cells = list(dict.fromkeys((one.question.length, one.question.depth) for one in asked))
    marks = [[one.question.score(one.answers[at].text) == 1 for one in asked] for at in range(len(arms))]
    rows = []
    for arm, own in zip(arms, marks, strict=True):
        for length, depth in cells:
            found = [m for m, (q, _) in zip(own, asked, strict=True) if (q.length, q.depth) == (length, depth)]
            cell = {"arm": arm.name, "length": length, "depth": depth, "asked": len(found), "found": sum(found)}
            rows.append({**cell, "model": models.get(arm.name, ""), "commit": commit})
    told = [_share(arm, own) for arm, own in zip(arms, marks, strict=True)]
    if not asked or np.mean(marks[0]) < CAN_READ:
        refusal = (
            f"needles: expected a model that finds needles under {arms[0].name}, got {told[0]}; this says nothing "
            "of the selection: try another --template, shorter --lengths, or --api chat"
        )
        return Section("needles", told[0], rows, refusal=refusal)
    verdict, tones = f"{' · '.join(told)}.", set[str]()
    for arm, own in zip(arms[1:], marks[1:], strict=True):
        p, lost = measures.sign_test(marks[0], own), sum(marks[0]) - sum(own)
        worse = p < NEVER and lost > 0
        verdict += f" {arm.name}: {'a' if worse else 'no'} significant loss (sign test: p = {p:.3g})"
        few = sum(marks[0]) < LEAST
        verdict += f"; not even all {sum(marks[0])} would be one: ask more." if few else "."
        tones.add("bad" if worse else "" if few or lost > 0 else "good")
    tone = "bad" if "bad" in tones else "good" if tones == {"good"} else ""
    return Section("needles", verdict, rows, tone, figures={"needles": heatmaps(rows)}, grid=_grid(rows))


def _share(arm: Arm, marks: Sequence[bool]) -> str:
    low, high = wilson(sum(marks), len(marks), 0.95) if marks else (0.0, 1.0)
    return f"{arm.name} found {sum(marks)} of {len(marks)} needles (95 % interval: {low:.1%} to {high:.1%})"


def _grid(rows: Sequence[Row]) -> Table:
    """A line for each length and depth, found / asked by arm."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    cells: dict[tuple[int, float], list[str]] = {}
    for row in rows:
        cells.setdefault((row["length"], row["depth"]), []).append(f"{row['found']} / {row['asked']}")
    return ("tokens", "depth", *arms), [[str(n), f"{100 * d:.0f} %", *found] for (n, d), found in cells.items()]


def times(asked: Sequence[Asked], arms: Sequence[Arm]) -> Section:
    """Median seconds of an answer by length, however long the answer; one question at a time was asked."""
    by: dict[int, list[list[float]]] = {}
    for question, answers in asked:
        by.setdefault(question.length, []).append([answer.seconds for answer in answers])
    rows = [
        {"arm": arm.name, "length": length, "asked": len(seconds), "median_s": float(np.median(seconds, axis=0)[at])}
        for at, arm in enumerate(arms)
        for length, seconds in by.items()
    ]
    longest = [f"{row['arm']} {row['median_s']:.2f} s" for row in rows if row["length"] == max(by)]
    return Section("times", f"Median time of an answer to {max(by, default=0)} tokens: {' · '.join(longest)}.", rows)


def agreement(asked: Sequence[Asked], arms: Sequence[Arm]) -> Section:
    """Equal greedy tokens of each arm and the first, prompt by prompt."""
    rows, told = [], []
    for at, arm in enumerate(arms[1:], 1):
        own = [measures.agreement(one.answers[0], one.answers[at]) for one in asked]
        for one, same in zip(asked, own, strict=True):
            rows.append({"arm": arm.name, "prompt": one.question.name, "tokens": one.question.length, **same._asdict()})
        paired = [same for same in own if same.kl is not None]
        kl = "; no log-probabilities that can be paired"
        if paired:
            mean = np.average([same.kl or 0.0 for same in paired], weights=[same.paired for same in paired])
            kl = f", mean KL {mean:.4g} nats"
        whole, units = sum(same.differs is None for same in own), sum(same.units for same in own)
        equal = sum(same.equal * same.units for same in own) / units if units else 1.0
        unit = " and ".join(dict.fromkeys(same.unit for same in own))
        told.append(
            f"{arm.name}: {whole} of {len(own)} answers are {arms[0].name}'s, {equal:.1%} of the {unit} come before a "
            f"difference{kl}."
        )
    return Section("agree", " ".join(told), rows)


def tasks(asked: Sequence[Asked], arms: Sequence[Arm]) -> Section:
    """Scores of a folder's questions; the mean is that of its files, which are a task each, whatever they hold."""
    rows = [
        {"task": q.name, "measure": q.measure, "tokens": q.length}
        | {f"score {arm.name}": q.score(answer.text) for arm, answer in zip(arms, answers, strict=True)}
        for q, answers in asked
    ]
    files: dict[str, list[Row]] = {}
    for (question, _), row in zip(asked, rows, strict=True):
        files.setdefault(question.task, []).append(row)
    means = {task: [np.mean([row[f"score {arm.name}"] for row in own]) for arm in arms] for task, own in files.items()}
    overall = [f"{arm.name} {mean:.3f}" for arm, mean in zip(arms, np.mean([*means.values()], axis=0), strict=True)]
    cells = [[task, str(len(files[task])), *(f"{mean:.3f}" for mean in own)] for task, own in means.items()]
    grid = ("task", "questions", *(f"mean score {arm.name}" for arm in arms)), cells
    told = f"Mean score over {len(files)} tasks of {len(rows)} questions: {' · '.join(overall)}."
    return Section("tasks", told, rows, grid=grid)


def recall(asked: Sequence[Asked], arms: Sequence[Arm], collector: Collector, index_topk: int) -> Section:
    """Share of the first arm's selected tokens that each other arm selects. Raises LoadError."""
    rows: list[Row] = []
    for at, arm in enumerate(arms[1:], 1):
        shares: dict[tuple[str, int], list[NDArray[np.float64]]] = {}
        for question, answers in asked:
            pair = [collector.positions(each, question) for each in (arms[0], arm)]
            if pair[0].shape[1] != pair[1].shape[1]:
                raise LoadError(
                    f"recall: expected one model, got {pair[0].shape[1]} and {pair[1].shape[1]} layers; serve one model"
                )
            prompt = len(question.ids)
            most = min(prompt + _common(answers[0], answers[at]), *map(len, pair))
            share = measures.recall(pair[0][:most], pair[1][:most])
            for layer in range(share.shape[1]):
                shares.setdefault(("prefill", layer), []).append(share[:prompt, layer])
                shares.setdefault(("decode", layer), []).append(share[prompt:, layer])
        for (phase, layer), parts in sorted(shares.items(), key=lambda item: (item[0][0] == "decode", item[0][1])):
            values = np.concatenate(parts)
            values = values[~np.isnan(values)]
            if len(values):
                mean, low = float(values.mean()), float(np.quantile(values, 0.1))
                rows.append(_kept(arm.name, phase, layer, {"recall": mean, "p10": low, "rows": len(values)}))
    if not rows:
        raise LoadError(f"recall: expected rows with more than {index_topk} tokens, got none; give longer prompts")
    return Section("recall", _means(rows), rows)


def _common(first: Answer, second: Answer) -> int:
    """New tokens that were fed back equally: the rows after them attend for different queries."""
    return next((i for i, (a, b) in enumerate(zip(first.ids, second.ids, strict=False)) if a != b), len(first.ids))


def audited(audits: Mapping[str, Audit]) -> Section:
    """Recall as each arm's own audit tells it since its server's start; no rows where none has audited any."""
    rows = [
        _kept(arm, phase, int(layer), told)
        for arm, phases in audits.items()
        for phase, layers in phases.items()
        for layer, told in layers.items()
    ]
    return Section("recall", _means(rows) if rows else "No arm has audited its recall (--misa-audit-rows).", rows)


def _kept(arm: str, phase: str, layer: int, told: Mapping[str, Any]) -> Row:
    return {"arm": arm, "phase": phase, "layer": layer, **{name: told[name] for name in ("recall", "p10", "rows")}}


def _means(rows: Sequence[Row]) -> str:
    told = [
        f"{arm} {phase} {np.mean([r['recall'] for r in rows if (r['arm'], r['phase']) == (arm, phase)]):.4f}"
        for arm, phase in dict.fromkeys((row["arm"], row["phase"]) for row in rows)
    ]
    return f"Mean recall over layers: {' · '.join(told)}."
