"""Every arm's answer to every question, over the load test's servers: A B, then B A, or one server after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from pydantic import ValidationError

from sglang_misa.bench.load import selection
from sglang_misa.bench.load.control import Control
from sglang_misa.bench.load.engine import ordered
from sglang_misa.bench.load.environment import facts
from sglang_misa.bench.load.plan import Arm, Plan
from sglang_misa.bench.load.progress import Live
from sglang_misa.bench.load.safety import Keys
from sglang_misa.bench.load.servers import ArmServer
from sglang_misa.bench.load.settings import LoadError
from sglang_misa.bench.load.store import Store
from sglang_misa.bench.quality.asking import Answer, ask, read
from sglang_misa.bench.quality.questions import Question, Tokenize

Make = Callable[[Tokenize], Sequence[Question]]
Keep = Callable[[Arm, Question, dict[str, Any]], None]


class Collector:
    """Asks, and keeps each answer in the run's folder: what is there is not asked again."""

    def __init__(
        self, plan: Plan, store: Store, keys: Keys, live: Live, extra: dict[str, Any], keep: Keep | None = None
    ):
        self._plan, self._store, self._keys, self._live = plan, store, keys, live
        self._extra, self._keep = extra, keep
        self.servers: dict[str, dict[str, str]] = {}
        self.models: dict[str, str] = {}
        self.questions: list[Question] = []

    def run(self, make: Make) -> list[Answer]:
        """Answers of all arms to what `make` writes with the first server's tokenizer. Raises LoadError."""
        arms, found = self._plan.arms, []
        if self._plan.mode == "together":
            with ExitStack() as stack:
                controls = {arm.name: stack.enter_context(self._server(arm)).control for arm in arms}
                self._prepare(make, controls[arms[0].name])
                for number, question in enumerate(self.questions):
                    found += [self._one(arm, controls[arm.name], question) for arm in ordered(arms, number)]
            return found
        for arm in arms:
            with self._server(arm) as server:
                self._prepare(make, server.control)
                found += [self._one(arm, server.control, question) for question in self.questions]
        return found

    def _prepare(self, make: Make, control: Control) -> None:
        if not self.questions:
            self.questions = list(make(control.tokenize))

    def information(self) -> dict[str, Any]:
        """The first arm's /server_info."""
        with self._server(self._plan.arms[0]) as server:
            return server.control.info

    def _server(self, arm: Arm) -> ArmServer:
        return _Checked(arm, self._plan, self._keys, self._store, self._live, self)

    def _one(self, arm: Arm, control: Control, question: Question) -> Answer:
        name = f"answers/{arm.digest()}-{question.digest()}.json"
        path = self._store.folder / name
        if self._keep is None and path.exists():
            try:
                return Answer.model_validate_json(path.read_bytes())
            except ValidationError:
                pass  # asked again
        self._live.unit(f"{arm.name} · {question.name}")
        begin = time.monotonic()
        bound_s = self._plan.bounds.request(len(question.ids) + question.new_tokens)
        raw = ask(control, self._plan.protocol, question, bound_s, **self._extra)
        answer = read(raw, self._plan.protocol, arm.name, question, time.monotonic() - begin)
        if self._keep is not None:
            self._keep(arm, question, raw)
        self._store.write(name, answer.model_dump_json())
        self._live.finished(f"{arm.name} · {question.name} · {answer.seconds:.2f} s")
        return answer


class _Checked(ArmServer):
    """An arm's server that runs the selection its arm claims."""

    def __init__(self, arm: Arm, plan: Plan, keys: Keys, store: Store, live: Live, owner: Collector):
        super().__init__(arm, plan, keys, store.folder, partial(live.waiting, f"arm {arm.name}"))
        self._owner, self._claimed = owner, arm

    def __enter__(self) -> _Checked:
        super().__enter__()
        info = self.control.info
        told = selection.problem(self._claimed.expect, info) if self._claimed.expect else None
        if told is not None:
            self.__exit__()
            raise LoadError(f"arm {self._claimed.name}: {told}; start it with that selection")
        self._owner.servers[self._claimed.name] = facts(info)
        self._owner.models[self._claimed.name] = str(info.get("model_path") or self.control.model)
        return self


def by_question(
    answers: Sequence[Answer], arms: Sequence[Arm], questions: Sequence[Question]
) -> Iterator[tuple[Question, list[Answer]]]:
    """(question, its answer in each arm)."""
    known = {(answer.arm, answer.question): answer for answer in answers}
    for question in questions:
        yield question, [known[arm.name, question.digest()] for arm in arms]
