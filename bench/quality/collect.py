"""Collects each arm's answer to each question, from servers that run together or one after another."""

from __future__ import annotations

import hashlib
import io
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import requests
from numpy.typing import NDArray
from pydantic import ValidationError

from sglang_misa.bench.load import selection
from sglang_misa.bench.load.engine import ordered
from sglang_misa.bench.load.environment import facts
from sglang_misa.bench.load.plan import Arm, Plan
from sglang_misa.bench.load.safety import Keys
from sglang_misa.bench.load.servers import ArmServer
from sglang_misa.bench.load.settings import LoadError
from sglang_misa.bench.load.store import Store
from sglang_misa.bench.quality.asking import GO_ON, Answer, ask, read, selected
from sglang_misa.bench.quality.measures import Audit, pooled
from sglang_misa.bench.quality.questions import Question, Tokenize

ATTEMPTS = 2  # at a question during which the server goes away

Make = Callable[[Tokenize], Sequence[Question]]


class Asked(NamedTuple):
    """A question and its answers, in the order of the arms."""

    question: Question
    answers: list[Answer]


class Watcher(Protocol):
    """What hears how far a collection is."""

    def expect(self, units: int) -> None:
        """So many answers are to come."""

    def waiting(self, name: str, line: str, seconds: float) -> None:
        """A server is starting; `line` is the last of its log."""

    def finished(self, line: str) -> None:
        """An answer is there."""


class Collector:
    """Asks, and keeps each answer in the run's folder: what is there is not asked again.

    extra: fields of every request. index_topk: the model's, where the selected positions are collected too. limit_s:
    seconds after which no more is asked; servers that run one after the other share them.
    """

    def __init__(
        self,
        plan: Plan,
        store: Store,
        keys: Keys,
        watcher: Watcher,
        *,
        extra: dict[str, Any] | None = None,
        index_topk: int | None = None,
        limit_s: float = math.inf,
    ):
        self._plan, self._store, self._keys, self._watcher = plan, store, keys, watcher
        self._index_topk, self._limit_s = index_topk, limit_s
        self._extra = (extra or {}) | ({"return_indexer_topk": True} if index_topk else {})
        self._answers: dict[tuple[str, str], Answer] = {}
        self._asked: Counter[str] = Counter()  # questions of this run, by arm
        self._routed: dict[str, dict[str, int]] = {}  # phase → calls, of arms with a selection of their own
        self._gates: dict[str, int] = {}  # tokens up to which stock DSA selects in their prefill
        self.questions: list[Question] = []
        self.left = 0  # questions that were not asked in time
        self.servers: dict[str, dict[str, str]] = {}  # facts by arm
        self.models: dict[str, str] = {}
        self.audited: dict[str, Audit] = {}  # as /server_info said in the end

    def run(self, make: Make) -> list[Asked]:
        """What `make` writes with the first server's tokenizer, as far as all arms answered it. Raises LoadError."""
        arms = self._plan.arms
        groups = [arms] if self._plan.mode == "together" else [(arm,) for arm in arms]
        for group in groups:
            with ExitStack() as stack:
                servers = {arm.name: stack.enter_context(self._server(arm)) for arm in group}
                if not self.questions:
                    self.questions = list(make(servers[group[0].name].control.tokenize))
                    self._watcher.expect(len(self.questions) * len(arms))
                for name, server in servers.items():
                    self._fits(name, server.control.info)
                before = {name: selection.calls(server.control.info) for name, server in servers.items()}
                self._ask(group, servers, time.monotonic() + self._limit_s / len(groups))
                for arm in group:
                    self._look(arm, servers[arm.name], before[arm.name])
        rows = [[self._answers.get((arm.name, q.digest())) for arm in arms] for q in self.questions]
        whole = [Asked(q, [a for a in row if a]) for q, row in zip(self.questions, rows, strict=True) if all(row)]
        self.left = len(self.questions) - len(whole)
        if self.questions and not whole:
            raise LoadError(f"limit_s: expected time for one question, got {self._limit_s:g} s; raise --limit-s")
        return whole

    def positions(self, arm: Arm, question: Question) -> NDArray[np.int32]:
        """Positions [rows, layers, index_topk] int32 that the arm's server attended to, -1 for none."""
        found: NDArray[np.int32] = np.load(self._path("selections", arm, question, "npy"), mmap_mode="r")
        return found

    def _server(self, arm: Arm) -> ArmServer:
        return _Checked(arm, self._plan, self._keys, self._store, self._watcher, self)

    def _fits(self, name: str, info: Mapping[str, Any]) -> None:
        """Raise LoadError for a prompt that the server will refuse, before others are asked for hours."""
        room, most = info.get("max_req_input_len"), max(self.questions, key=lambda q: len(q.ids), default=None)
        if isinstance(room, int) and most is not None and len(most.ids) >= room:
            raise LoadError(
                f"arm {name}: expected prompts under {room} tokens, its max_req_input_len, got {len(most.ids)} in "
                f"{most.name}; ask for shorter ones, or serve with a longer --context-length"
            )

    @property
    def idle(self) -> list[str]:
        """Sentences for arms of which nothing was asked that their own selection took: stock DSA answered all."""
        return [
            f"{arm.name}: expected calls that {arm.expect} selects for, got none: stock DSA answered all, as it does "
            "prompts under a policy's min_len; ask longer ones, or lower --misa-prefill-min-len"
            for arm in self._plan.arms
            if (routed := self._routed.get(arm.name)) is not None and not any(n > 0 for n in routed.values())
        ]

    @property
    def remarks(self) -> list[str]:
        """Sentences for what of an arm's answers its own selection had no part in."""
        found = []
        for name, routed in self._routed.items():
            found += [f"{name}: stock DSA took every call of {phase}." for phase, n in routed.items() if n <= 0]
            gate = self._gates.get(name, 0)
            under = sum(len(question.ids) <= gate for question in self.questions)
            if under and routed.get("prefill", 0) > 0:
                found.append(
                    f"{name}: {under} of {len(self.questions)} prompts are under its min_len of {gate} tokens in "
                    "prefill, where stock DSA selects."
                )
        return found

    def _look(self, arm: Arm, server: ArmServer, before: Mapping[str, int]) -> None:
        """Keep what the arm's server says in the end: its audit, in all ranks, and the calls that it selected for.

        A run that goes on adds what its servers said before; those that it did not launch still tell it in their audit.
        """
        info = server.control.refresh()
        ranks = selection.ranks_of(info)
        audit = pooled([rank.get("recall") or {} for rank in ranks])
        if not self.questions:
            self.audited[arm.name] = audit
            return
        path = self._store.folder / "servers" / f"{arm.digest()}.json"
        known = path.exists() or self._asked[arm.name]
        earlier = json.loads(path.read_bytes()) if path.exists() else {"recall": {}, "routed": {}}
        audit = pooled([earlier["recall"], audit]) if arm.launched else audit or earlier["recall"]
        routed: dict[str, int] = {}
        if known and arm.expect is not None and arm.expect not in selection.STOCK:
            after = selection.calls(info)
            before = before if sum(after.values()) >= sum(before.values()) else {}  # the server was started anew
            for phase, count in selection.routed(arm.expect, info, before, after).items():
                routed[phase] = count + earlier["routed"].get(phase, 0)
            self._routed[arm.name] = routed
            self._gates[arm.name] = max((rank["min_len"].get("prefill") or 0 for rank in ranks), default=0)
        self.audited[arm.name] = audit
        self._save(path, json.dumps({"recall": audit, "routed": routed}))

    def _ask(self, arms: tuple[Arm, ...], servers: dict[str, ArmServer], deadline: float) -> None:
        for number, question in enumerate(self.questions):
            for arm in ordered(arms, number):
                answer = self._kept(arm, question)
                if answer is None:
                    if time.monotonic() > deadline:
                        continue
                    answer = self._one(arm, servers[arm.name], question)
                    self._asked[arm.name] += 1
                self._answers[arm.name, question.digest()] = answer
                self._watcher.finished(f"{arm.name} · {question.name} · {answer.seconds:.2f} s")

    def _kept(self, arm: Arm, question: Question) -> Answer | None:
        if self._index_topk and not self._path("selections", arm, question, "npy").exists():
            return None
        try:
            return Answer.model_validate_json(self._path("answers", arm, question, "json").read_bytes())
        except (OSError, ValidationError):
            return None

    def _path(self, folder: str, arm: Arm, question: Question, ending: str) -> Path:
        asked = json.dumps([arm.digest(), question.digest(), self._plan.protocol.api, self._extra])
        return self._store.folder / folder / f"{hashlib.sha256(asked.encode()).hexdigest()[:24]}.{ending}"

    def _one(self, arm: Arm, server: ArmServer, question: Question) -> Answer:
        raw, seconds = self._raw(server, question)
        answer = read(raw, self._plan.protocol, arm.name, question, seconds)
        if self._index_topk:
            kept = io.BytesIO()
            np.save(kept, selected(raw, self._index_topk, arm.name))
            self._save(self._path("selections", arm, question, "npy"), kept.getvalue())
        self._save(self._path("answers", arm, question, "json"), answer.model_dump_json())
        return answer

    def _raw(self, server: ArmServer, question: Question, attempts: int = ATTEMPTS) -> tuple[dict[str, Any], float]:
        """The server's own answer, and its seconds."""
        bound_s = self._plan.bounds.request(len(question.ids) + question.new_tokens)
        try:
            return ask(server.control, self._plan.protocol, question, bound_s, **self._extra)
        except requests.RequestException as error:
            if attempts == 1 or not isinstance(error, requests.ConnectionError):
                raise LoadError(
                    f"{server.control.url}: expected an answer in {bound_s:.0f} s, got {error}; what was answered is "
                    f"kept: {GO_ON}"
                ) from None
        server.recover()
        return self._raw(server, question, attempts - 1)

    def _save(self, path: Path, content: str | bytes) -> None:
        self._store.write(str(path.relative_to(self._store.folder)), content)


class _Checked(ArmServer):
    """An arm's server that runs the selection its arm claims."""

    go_on = GO_ON

    def __init__(self, arm: Arm, plan: Plan, keys: Keys, store: Store, watcher: Watcher, owner: Collector):
        super().__init__(arm, plan, keys, store.folder, partial(watcher.waiting, f"arm {arm.name}"))
        self._owner, self._claimed = owner, arm

    def __enter__(self) -> _Checked:
        super().__enter__()
        info = self.control.info
        told = selection.problem(self._claimed.expect, info) if self._claimed.expect else None
        if told is not None:
            self.__exit__()
            raise LoadError(
                f"arm {self._claimed.name}: {told}; start it with that selection, or correct --expect or the name"
            )
        self._owner.servers[self._claimed.name] = facts(info)
        self._owner.models[self._claimed.name] = str(info.get("model_path") or self.control.model)
        return self
