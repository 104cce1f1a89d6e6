"""Command line: needles · all · agree · recall · tasks."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console

from sglang_misa import text_files
from sglang_misa.bench.load import selection, shell
from sglang_misa.bench.load.checks import check_arms
from sglang_misa.bench.load.environment import Environment
from sglang_misa.bench.load.plan import Arm, Plan
from sglang_misa.bench.load.progress import Live
from sglang_misa.bench.load.prompts import source_of
from sglang_misa.bench.load.safety import Keys
from sglang_misa.bench.load.settings import MADE, Access, Bounds, Lengths, LoadError, Protocol, Serving, Workload
from sglang_misa.bench.load.store import Store
from sglang_misa.bench.load.trace import LONGEST
from sglang_misa.bench.quality import page, questions, sections
from sglang_misa.bench.quality.asking import GO_ON, wants_logprobs
from sglang_misa.bench.quality.collect import Collector
from sglang_misa.bench.quality.page import Row, Section
from sglang_misa.bench.quality.questions import TEMPLATES, Question, Tokenize
from sglang_misa.bench.quality.words import NAMES

NAMED = ("stock", "other")  # two arms, where neither their names nor what they run is given
ALONE = ("server",)  # and one
CELL = ("model", "arm", "length", "depth")  # what a result of needles is known by


@dataclass(frozen=True)
class Common:
    """Options of every measurement."""

    servers: tyro.conf.Positional[tuple[str, ...]] = ("http://127.0.0.1:30000",)
    """URL or launch command of each arm, the baseline first: stock DSA, where several are compared"""
    names: tuple[str, ...] = ()
    """what to call the arms; default: as --expect says, or server for one, stock and other for two"""
    expect: tuple[str, ...] = ()
    """token selection that must be running in each arm: dsa, fast, faithful …; default: dsa in an arm called stock"""
    ab_mode: Literal["together", "alternate"] = "together"
    """together = all servers run all the time; alternate = one after the other, for one GPU"""
    protocol: tyro.conf.OmitArgPrefixes[Protocol] = field(default_factory=Protocol)
    access: tyro.conf.OmitArgPrefixes[Access] = field(default_factory=Access)
    serving: tyro.conf.OmitArgPrefixes[Serving] = field(default_factory=Serving)
    bounds: tyro.conf.OmitArgPrefixes[Bounds] = field(default_factory=Bounds)
    out: Path | None = None
    """folder of the artefacts; answers found there are not asked again; default: quality-DATE-TIME"""
    new_tokens: int = 32
    """tokens of an answer"""
    limit_s: float = math.inf
    """seconds after which no more is asked; what is there is told, and the same command with --out goes on"""

    def plan(self) -> Plan:
        """Arms and access, without the load test's cells. Raises LoadError."""
        count = len(self.servers)
        names = self.names or self.expect or (ALONE if count == 1 else NAMED)
        if len(self.expect) not in (0, count):
            raise LoadError(
                f"expect: expected a selection for each of the {count} servers, or none, got {', '.join(self.expect)}; "
                "correct --expect"
            )
        if len(names) != count or len({*names}) < count:
            raise LoadError(
                f"names: expected {count} different ones for as many servers, got {', '.join(names)}; set --names"
            )
        if self.new_tokens < 1:
            raise LoadError(f"new_tokens: expected at least 1, got {self.new_tokens}; raise --new-tokens")
        if not self.limit_s >= 0:  # nor is NaN, which no time is over
            raise LoadError(f"limit_s: expected seconds, 0 or more, got {self.limit_s:g}; correct --limit-s")
        stock: tuple[str | None, ...] = tuple(name if name in selection.STOCK else None for name in names)
        arms = zip(names, self.servers, self.expect or stock, strict=True)
        return Plan(
            arms=tuple(Arm(name=name, server=server, expect=expect) for name, server, expect in arms),
            cells=(),
            mode=self.ab_mode,
            protocol=self.protocol,
            access=self.access,
            serving=self.serving,
            bounds=self.bounds,
        )

    def check(self) -> None:
        """Refuse what would fail later, before a server is asked or started. Raises LoadError."""

    @property
    def extra(self) -> dict[str, Any]:
        """Fields of every request."""
        return {}

    @property
    def positions(self) -> int | None:
        """The model's index_topk, where selected positions are wanted."""
        return None

    def measure(self, collector: Collector, arms: Sequence[Arm], commit: str) -> list[Section]:
        """Ask, and say what the answers show. Raises LoadError."""
        raise NotImplementedError


def _several(servers: Sequence[str]) -> None:
    if len(servers) < 2:
        raise LoadError(f"servers: expected two or more to compare, got {servers[0]}; name another")


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
    json: Path | None = None
    """a JSON list to add the results to; they replace those of the same model, arm, length and depth"""

    def check(self) -> None:
        if self.depths < 2 or self.repeats < 1 or not self.tokens or not 0 <= self.others < len(NAMES):
            raise LoadError(
                f"needles: expected lengths, at least 2 depths, 1 repeat and 0 to {len(NAMES) - 1} others, got "
                f"{len(self.lengths)}, {self.depths}, {self.repeats} and {self.others}; correct them"
            )
        if len({*self.tokens}) < len(self.tokens):
            raise LoadError(
                f"lengths: expected each length once, as an answer counts once, got {', '.join(self.lengths)}; drop one"
            )
        if (asked := sum(self.tokens) * self.depths * self.repeats) > LONGEST:
            raise LoadError(
                f"lengths: expected at most {LONGEST} tokens in all questions, got {asked}; "
                "ask for shorter prompts, or fewer --depths or --repeats"
            )
        if self.text not in MADE:
            text_files.read(Path(self.text), LoadError)
        if self.json is not None and not self.json.parent.is_dir():
            raise LoadError(f"json: expected a file in a folder that exists, got {self.json}; change --json")
        _listed(self.json)

    @property
    def tokens(self) -> list[int]:
        """Tokens of the prompts, the shortest first. Raises LoadError."""
        lengths = [Lengths.parse(text) for text in self.lengths]
        if spread := [text for text, one in zip(self.lengths, lengths, strict=True) if one.kind != "fixed"]:
            raise LoadError(f"lengths: expected numbers of tokens such as 4k, got {spread[0]}; name each length")
        return sorted(one.longest for one in lengths)

    def measure(self, collector: Collector, arms: Sequence[Arm], commit: str) -> list[Section]:
        found = self.of_answers(collector, arms, commit)
        if self.json is not None and not collector.idle and not found[0].refusal:
            rows = {tuple(row[name] for name in CELL): row for row in [*_listed(self.json), *found[0].rows]}
            lines = ",\n ".join(json.dumps(row) for row in rows.values())
            self.json.write_text(f"[\n {lines}\n]\n", encoding="utf-8")
        return found

    def of_answers(self, collector: Collector, arms: Sequence[Arm], commit: str) -> list[Section]:
        """Ask, and say who found what."""
        return [sections.needles(collector.run(self.make), arms, collector.models, commit)]

    def make(self, tokenize: Tokenize) -> list[Question]:
        """The questions, the shortest first. Raises LoadError."""
        source = source_of(Workload(text=self.text, seed=self.seed), self.tokens[-1], tokenize)
        depths = np.linspace(0, 1, self.depths).round(3).tolist()
        shape = (self.tokens, depths, self.repeats, self.others, self.new_tokens, self.seed)
        return list(questions.needles(source, TEMPLATES[self.template], *shape))


def _listed(path: Path | None) -> list[Row]:
    """The results in a list that may not be there yet. Raises LoadError."""
    if path is None or not path.exists():
        return []
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(listed, list) or not all(row.keys() >= {*CELL} for row in listed):
            raise ValueError(f"a row without {', '.join(CELL)}, or no list")
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise LoadError(f"json: expected a list of results, got {path} ({error}); name another file") from None
    return list(listed)


@dataclass(frozen=True)
class All(Needles):
    """Needles, and of the same answers their time, how far the arms agree, and the recall that the servers audit."""

    @property
    def extra(self) -> dict[str, Any]:
        return wants_logprobs(self.protocol)

    def of_answers(self, collector: Collector, arms: Sequence[Arm], commit: str) -> list[Section]:
        asked = collector.run(self.make)
        found = [sections.needles(asked, arms, collector.models, commit), sections.times(asked, arms)]
        found += [sections.audited(collector.audited)]
        return [*found, sections.agreement(asked, arms)] if len(arms) > 1 else found


@dataclass(frozen=True)
class Agree(Common):
    """The same prompts to all arms: equal greedy tokens, first difference, KL of the log-probabilities."""

    prompts: Path = Path("prompts.jsonl")
    """your prompts: JSON Lines with `prompt` or `text`, or one text file"""
    least: int = 2049
    """tokens under which a prompt is refused: with no more than index_topk all arms attend to everything"""

    @property
    def extra(self) -> dict[str, Any]:
        return wants_logprobs(self.protocol)

    def check(self) -> None:
        _several(self.servers)
        text_files.read(self.prompts, LoadError)

    def measure(self, collector: Collector, arms: Sequence[Arm], commit: str) -> list[Section]:
        asked = collector.run(lambda tok: questions.prompts(self.prompts, tok, self.new_tokens, self.least))
        return [sections.agreement(asked, arms)]


@dataclass(frozen=True)
class Recall(Common):
    """Share of the first arm's selected tokens that each other arm selects, by layer and phase."""

    prompts: Path | None = None
    """your prompts, as for agree; needed unless --audit"""
    least: int = 2049
    """tokens under which a prompt is refused"""
    index_topk: int = 2048
    """tokens that the model selects"""
    audit: bool = False
    """read the live audit of each arm instead (--misa-audit-rows), without asking anything"""

    def check(self) -> None:
        if self.audit:
            return
        _several(self.servers)
        if self.prompts is None:
            raise LoadError("prompts: expected prompts to select on, got none; add --prompts FILE, or --audit")
        text_files.read(self.prompts, LoadError)
        if self.protocol.api != "generate":
            raise LoadError(
                f"api: expected --api generate, which returns selections, got {self.protocol.api}; leave it out"
            )

    @property
    def positions(self) -> int | None:
        return None if self.audit else self.index_topk

    def measure(self, collector: Collector, arms: Sequence[Arm], commit: str) -> list[Section]:
        prompts = self.prompts
        if self.audit or prompts is None:
            collector.run(lambda tok: [])
            found = sections.audited(collector.audited)
            if not found.rows:
                raise LoadError(
                    "audit: expected recall in /server_info, got none; start the server with --misa-audit-rows and a "
                    "policy, and send it prompts over --misa-prefill-min-len"
                )
            return [found]
        asked = collector.run(lambda tok: questions.prompts(prompts, tok, self.new_tokens, self.least))
        return [sections.recall(asked, arms, collector, self.index_topk)]


@dataclass(frozen=True)
class Tasks(Common):
    """Questions from a folder of JSON Lines: RULER's (input, outputs) or LongBench's (context, input, answers)."""

    folder: Path = Path("tasks")
    """folder with *.jsonl"""

    def check(self) -> None:
        questions.task_files(self.folder)

    def measure(self, collector: Collector, arms: Sequence[Arm], commit: str) -> list[Section]:
        asked = collector.run(lambda tok: questions.tasks(self.folder, tok, self.new_tokens))
        return [sections.tasks(asked, arms)]


Command = (
    Annotated[Needles, tyro.conf.subcommand("needles")]
    | Annotated[All, tyro.conf.subcommand("all")]
    | Annotated[Agree, tyro.conf.subcommand("agree")]
    | Annotated[Recall, tyro.conf.subcommand("recall")]
    | Annotated[Tasks, tyro.conf.subcommand("tasks")]
)


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 cannot be done as asked or says nothing, 130 interrupted."""

    def act(command: Command, console: Console) -> int:
        return _run(command, sys.argv[1:] if arguments is None else arguments, console)

    kept = "the same command with --out goes on with what is missing"
    return shell.run(Command, act, "sglang_misa.bench.quality", arguments, kept)


def _run(command: Command, arguments: Sequence[str], console: Console) -> int:
    plan = command.plan()
    check_arms(plan)
    command.check()
    keys = Keys.read(plan.access)
    environment = Environment.now(arguments, keys, module="sglang_misa.bench.quality")
    folder = command.out or Path(f"quality-{datetime.now():%Y%m%d-%H%M%S}")
    with Store(folder, keys, GO_ON) as store:
        store.save_environment(environment)
        with Live(console, 0) as live:
            collector = Collector(
                plan, store, keys, live, extra=command.extra, index_topk=command.positions, limit_s=command.limit_s
            )
            found = command.measure(collector, plan.arms, environment.commit)
        title = type(command).__name__
        if collector.left:
            title += f": {collector.left} of {len(collector.questions)} questions left out, for --limit-s"
            console.print(f"{title}; go on with --out {store.folder}", style="yellow", highlight=False)
        refusals, remarks = [*collector.idle, *(each.refusal for each in found if each.refusal)], collector.remarks
        path = page.write(store, plan, environment, title, found, collector.servers, refusals, remarks)
    for remark in remarks:
        console.print(remark, style="yellow", highlight=False)
    if refusals:
        raise LoadError(refusals[0])
    for section in found:
        console.print(section.verdict, style="bold", highlight=False)
    console.print(f"report: {path}", highlight=False, soft_wrap=True)
    return shell.OK
