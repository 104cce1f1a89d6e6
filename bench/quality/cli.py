"""Command line: needles · agree · recall · tasks."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from matplotlib.figure import Figure
from rich.console import Console

from sglang_misa.bench.load import shell
from sglang_misa.bench.load.environment import Environment
from sglang_misa.bench.load.plan import Arm, Plan
from sglang_misa.bench.load.progress import Live
from sglang_misa.bench.load.prompts import source_of
from sglang_misa.bench.load.safety import Keys
from sglang_misa.bench.load.selection import ranks_of
from sglang_misa.bench.load.settings import Access, Bounds, Lengths, LoadError, Protocol, Serving, Workload
from sglang_misa.bench.load.stats import wilson
from sglang_misa.bench.load.store import Store
from sglang_misa.bench.quality import measures, page, questions
from sglang_misa.bench.quality.asking import Answer, selected, wants_logprobs
from sglang_misa.bench.quality.collect import Collector, by_question
from sglang_misa.bench.quality.questions import TEMPLATES, Question, Tokenize
from sglang_misa.bench.quality.words import NAMES

CAN_READ = 0.5  # share of needles that the first arm must find before anything is said of the second
NEVER = 0.05  # level of the sign test


@dataclass(frozen=True)
class Common:
    """Options of every measurement."""

    a: tyro.conf.Positional[str] = "http://127.0.0.1:30000"
    """URL or launch command of the first arm: stock DSA, where two are compared"""
    b: str | None = None
    """URL or launch command of the second arm"""
    names: tuple[str, str] = ("stock", "misa")
    """what to call the arms"""
    a_expect: str | None = None
    """token selection that must be running in the first arm: dsa, fast, faithful, misa …"""
    b_expect: str | None = None
    """token selection that must be running in the second"""
    ab_mode: Literal["together", "alternate"] = "together"
    """together = both servers run all the time; alternate = one after the other, for one GPU"""
    protocol: tyro.conf.OmitArgPrefixes[Protocol] = field(default_factory=Protocol)
    access: tyro.conf.OmitArgPrefixes[Access] = field(default_factory=Access)
    serving: tyro.conf.OmitArgPrefixes[Serving] = field(default_factory=Serving)
    bounds: tyro.conf.OmitArgPrefixes[Bounds] = field(default_factory=Bounds)
    out: Path | None = None
    """folder of the artefacts; answers found there are not asked again; default: quality-DATE-TIME"""
    new_tokens: int = 32
    """tokens of an answer"""

    def plan(self) -> Plan:
        """Arms and access, without the load test's cells."""
        pair = [(self.a, self.a_expect), *([(self.b, self.b_expect)] if self.b is not None else [])]
        arms = tuple(Arm(name=n, server=s, expect=e) for n, (s, e) in zip(self.names, pair, strict=False))
        if len({arm.name for arm in arms}) < len(arms):
            raise LoadError(f"names: expected two different names, got {arms[0].name} twice; change one")
        if self.new_tokens < 1:
            raise LoadError(f"new_tokens: expected at least 1, got {self.new_tokens}; raise --new-tokens")
        return Plan(
            arms=arms,
            cells=(),
            mode=self.ab_mode,
            protocol=self.protocol,
            access=self.access,
            serving=self.serving,
            bounds=self.bounds,
        )


@dataclass(frozen=True)
class Needles(Common):
    """Facts hidden in long text at every depth and length, and asked for."""

    lengths: tuple[str, ...] = ("4k", "8k", "16k", "32k", "64k", "128k")
    """prompt tokens"""
    depths: int = 9
    """depths from the start to the end of the text"""
    repeats: int = 2
    """questions at each length and depth, each over other text"""
    others: int = 8
    """facts in the text that are not asked for"""
    template: Literal["pass", "note", "pairs"] = "pass"
    """how facts are told: pass, note = sentences; pairs = ` set NAME VALUE`, for a model that was trained on that"""
    text: str = "builtin"
    """haystack: builtin prose, or a text file"""
    seed: int = 0


@dataclass(frozen=True)
class Agree(Common):
    """The same prompts to both arms: equal greedy tokens, first difference, KL of the log-probabilities."""

    prompts: Path = Path("prompts.jsonl")
    """your prompts: JSON Lines with `prompt` or `text`, or one text file"""
    least: int = 2049
    """tokens under which a prompt is refused: with no more than index_topk both arms attend to everything"""


@dataclass(frozen=True)
class Recall(Common):
    """Share of the first arm's selected tokens that the second selects, by layer and phase."""

    prompts: Path | None = None
    """your prompts, as for agree; needed unless --audit"""
    least: int = 2049
    """tokens under which a prompt is refused"""
    index_topk: int = 2048
    """tokens that the model selects"""
    audit: bool = False
    """read the live audit of the first arm instead (--misa-audit-rows), without asking anything"""


@dataclass(frozen=True)
class Tasks(Common):
    """Questions from a folder of JSON Lines: RULER's (input, outputs) or LongBench's (context, input, answers)."""

    folder: Path = Path("tasks")
    """folder with *.jsonl"""


Command = (
    Annotated[Needles, tyro.conf.subcommand("needles")]
    | Annotated[Agree, tyro.conf.subcommand("agree")]
    | Annotated[Recall, tyro.conf.subcommand("recall")]
    | Annotated[Tasks, tyro.conf.subcommand("tasks")]
)


@dataclass(frozen=True)
class Found:
    """What a run ends with."""

    title: str
    verdict: str
    results: list[dict[str, Any]]
    columns: tuple[str, ...]
    tone: str = ""
    figures: dict[str, Figure] = field(default_factory=dict)


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 cannot be done as asked or says nothing, 130 interrupted."""

    def act(command: Command, console: Console) -> int:
        return _run(command, sys.argv[1:] if arguments is None else arguments, console)

    kept = "the same command with --out goes on with what is missing"
    return shell.run(Command, act, "sglang_misa.bench.quality", arguments, kept)


def _run(command: Command, arguments: Sequence[str], console: Console) -> int:
    plan = command.plan()
    keys = Keys.read(plan.access)
    store = Store(command.out or Path(f"quality-{datetime.now():%Y%m%d-%H%M%S}"), keys)
    environment = Environment.now(arguments, keys, module="sglang_misa.bench.quality")
    store.save_environment(environment)
    with Live(console, 0) as live:
        if isinstance(command, Needles):
            found, servers = _needles(command, plan, store, keys, live, environment)
        elif isinstance(command, Agree):
            found, servers = _agree(command, plan, store, keys, live)
        elif isinstance(command, Recall):
            found, servers = _recall(command, plan, store, keys, live)
        else:
            found, servers = _tasks(command, plan, store, keys, live)
    store.write(f"{type(command).__name__.lower()}.json", json.dumps(found.results, indent=1) + "\n")
    rows = [[_shown(row[column]) for column in found.columns] for row in found.results]
    path = page.write(
        store,
        plan,
        environment,
        title=found.title,
        verdict=found.verdict,
        tone=found.tone,
        shown=[("Results", found.columns, rows)],
        figures=found.figures,
        servers=servers,
    )
    console.print(found.verdict, style="bold", markup=False, highlight=False)
    console.print(f"report: {path}", highlight=False, soft_wrap=True)
    return shell.OK


def _shown(value: object) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _needles(
    command: Needles, plan: Plan, store: Store, keys: Keys, live: Live, environment: Environment
) -> tuple[Found, dict[str, Any]]:
    lengths = [Lengths.parse(text).longest for text in command.lengths]
    if command.depths < 2 or command.repeats < 1 or not lengths or not 0 <= command.others < len(NAMES):
        raise LoadError(
            "needles: expected lengths, at least 2 depths, 1 repeat and 0 to 49 others; change what is less"
        )
    depths = np.linspace(0, 1, command.depths).round(3).tolist()
    workload = Workload(text=command.text, seed=command.seed)

    def make(tokenize: Tokenize) -> list[Question]:
        source = source_of(workload, max(lengths), tokenize)
        template = TEMPLATES[command.template]
        shape = (lengths, depths, command.repeats, command.others, command.new_tokens, command.seed)
        return list(questions.needles(source, template, *shape))

    collector = Collector(plan, store, keys, live, {})
    answers = collector.run(make)
    right = {(a.arm, a.question): a for a in answers}
    results = []
    for arm in plan.arms:
        for length in lengths:
            for depth in depths:
                own = [q for q in collector.questions if (q.length, q.depth) == (length, depth)]
                found = sum(q.score(right[arm.name, q.digest()].text) == 1 for q in own)
                row = {"arm": arm.name, "length": length, "depth": depth, "asked": len(own), "found": found}
                commit = environment.client["sglang-misa"]
                results.append({**row, "model": collector.models.get(arm.name, ""), "commit": commit})
    marks = [[q.score(right[arm.name, q.digest()].text) == 1 for q in collector.questions] for arm in plan.arms]
    told = [_share(arm, mark) for arm, mark in zip(plan.arms, marks, strict=True)]
    if np.mean(marks[0]) < CAN_READ:
        store.write("needles.json", json.dumps(results, indent=1) + "\n")
        raise LoadError(
            f"needles: expected a model that finds needles under {plan.arms[0].name}, got {told[0]}; this says nothing "
            "of the selection: try another --template, shorter --lengths, or --api chat"
        )
    verdict, tone = " · ".join(told), ""
    if len(marks) == 2:
        p = measures.sign_test(*marks)
        worse = p < NEVER and np.mean(marks[1]) < np.mean(marks[0])
        tone = "bad" if worse else "good"
        verdict += (
            f". {plan.arms[1].name} {'finds fewer' if worse else 'is not seen to find fewer'} (sign test: p = {p:.3g})."
        )
    figures = {f"needles-{arm.name}": page.heatmap(arm.name, results) for arm in plan.arms}
    columns = ("arm", "length", "depth", "asked", "found")
    return Found("Needles", verdict, results, columns, tone, figures), collector.servers


def _share(arm: Arm, marks: Sequence[bool]) -> str:
    low, high = wilson(sum(marks), len(marks), 0.95)
    return f"{arm.name} found {sum(marks)} of {len(marks)} needles [{low:.1%}, {high:.1%}]"


def _both(command: Common, plan: Plan) -> None:
    if len(plan.arms) != 2:
        raise LoadError(f"b: expected a second server to compare {command.a} with, got none; add --b")


def _agree(command: Agree, plan: Plan, store: Store, keys: Keys, live: Live) -> tuple[Found, dict[str, Any]]:
    _both(command, plan)
    collector = Collector(plan, store, keys, live, wants_logprobs(plan.protocol))
    answers = collector.run(lambda tok: questions.prompts(command.prompts, tok, command.new_tokens, command.least))
    results = []
    for question, (first, second) in by_question(answers, plan.arms, collector.questions):
        same = measures.agreement(first, second)
        results.append({"prompt": question.name, "tokens": question.length, **same._asdict()})
    equal = float(np.mean([row["equal"] for row in results]))
    kls = [row["kl"] for row in results if row["kl"] is not None]
    told = f", mean KL {np.mean(kls):.4g} nats" if kls else "; the servers tell no log-probabilities that can be paired"
    whole = sum(row["differs"] is None for row in results)
    verdict = f"{whole} of {len(results)} answers are equal; {equal:.1%} of the tokens come before a difference{told}."
    return Found("Agreement", verdict, results, tuple(results[0])), collector.servers


def _tasks(command: Tasks, plan: Plan, store: Store, keys: Keys, live: Live) -> tuple[Found, dict[str, Any]]:
    collector = Collector(plan, store, keys, live, {})
    answers = collector.run(lambda tok: questions.tasks(command.folder, tok, command.new_tokens))
    results = [
        {"task": q.name, "measure": q.measure, "tokens": q.length}
        | {f"score {arm.name}": q.score(answer.text) for arm, answer in zip(plan.arms, told, strict=True)}
        for q, told in by_question(answers, plan.arms, collector.questions)
    ]
    means = [f"{arm.name} {np.mean([row[f'score {arm.name}'] for row in results]):.3f}" for arm in plan.arms]
    return Found("Tasks", f"Mean score: {' · '.join(means)}.", results, tuple(results[0])), collector.servers


def _recall(command: Recall, plan: Plan, store: Store, keys: Keys, live: Live) -> tuple[Found, dict[str, Any]]:
    if command.audit:
        collector = Collector(plan.model_copy(update={"arms": plan.arms[:1]}), store, keys, live, {})
        return Found("Recall by the live audit", *_audited(collector)), collector.servers
    _both(command, plan)
    if command.prompts is None:
        raise LoadError("prompts: expected prompts to select on, got none; add --prompts FILE, or --audit")
    if plan.protocol.api != "generate":
        raise LoadError(
            f"api: expected --api generate, which returns selections, got {plan.protocol.api}; leave it out"
        )
    seen: dict[tuple[str, str], np.ndarray] = {}

    def keep(arm: Arm, question: Question, raw: dict[str, Any]) -> None:
        seen[arm.name, question.digest()] = selected(raw, command.index_topk, arm.name)

    collector = Collector(plan, store, keys, live, {"return_indexer_topk": True}, keep)
    answers = collector.run(
        lambda tok: questions.prompts(command.prompts or Path(), tok, command.new_tokens, command.least)
    )
    shares: dict[tuple[str, int], list[np.ndarray]] = {}
    for question, (first, second) in by_question(answers, plan.arms, collector.questions):
        pair = [seen[arm.name, question.digest()] for arm in plan.arms]
        if pair[0].shape[1] != pair[1].shape[1]:
            raise LoadError(f"recall: expected one model, got {pair[0].shape[1]} and {pair[1].shape[1]} layers")
        rows = len(question.ids) + (_common(first, second) if first.ids else 0)
        rows = min(rows, *map(len, pair))
        share = measures.recall(pair[0][:rows], pair[1][:rows])
        for layer in range(share.shape[1]):
            shares.setdefault(("prefill", layer), []).append(share[: len(question.ids), layer])
            shares.setdefault(("decode", layer), []).append(share[len(question.ids) :, layer])
    results = []
    for (phase, layer), parts in sorted(shares.items(), key=lambda item: (item[0][0] == "decode", item[0][1])):
        values = np.concatenate(parts)
        values = values[~np.isnan(values)]
        if len(values):
            mean, low = float(values.mean()), float(np.quantile(values, 0.1))
            results.append({"phase": phase, "layer": layer, "recall": mean, "p10": low, "rows": len(values)})
    if not results:
        raise LoadError(
            f"recall: expected rows with more than {command.index_topk} tokens, got none; give longer prompts"
        )
    return Found("Recall", _means(results), results, tuple(results[0])), collector.servers


def _common(first: Answer, second: Answer) -> int:
    """New tokens that were fed back equally: the rows after them attend for different queries."""
    return next((i for i, (a, b) in enumerate(zip(first.ids, second.ids, strict=False)) if a != b), len(first.ids))


def _audited(collector: Collector) -> tuple[str, list[dict[str, Any]], tuple[str, ...]]:
    info = collector.information()
    results = [
        {"phase": phase, "layer": int(layer), "recall": row["recall"], "p10": row["p10"], "rows": row["rows"]}
        for rank in ranks_of(info)[:1]
        for phase, layers in (rank.get("recall") or {}).items()
        for layer, row in layers.items()
    ]
    if not results:
        raise LoadError(
            "audit: expected recall in /server_info, got none; start the server with --misa-audit-rows and a policy, "
            "and send it prompts over --misa-prefill-min-len"
        )
    return _means(results), results, tuple(results[0])


def _means(results: Sequence[dict[str, Any]]) -> str:
    phases = dict.fromkeys(row["phase"] for row in results)
    told = [f"{phase} {np.mean([row['recall'] for row in results if row['phase'] == phase]):.4f}" for phase in phases]
    return f"Mean recall over layers: {' · '.join(told)}."
