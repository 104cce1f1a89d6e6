"""From a workload to the exact conversations of one block: same seed and block, same tokens, for every arm."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sglang_misa.bench.load.prompts import Ids, Source
from sglang_misa.bench.load.settings import Lengths, LoadError, Workload

LEAD = 2  # tokens that make each prompt differ right after its shared prefix
WARMUP_STREAM, PREFIX_STREAM, MEASURED_STREAM, KEEP_STREAM = range(4)
SLACK = 64  # plain tokens after the lead, free of facts, that a chat's text may lose to fit its token count


@dataclass(frozen=True, slots=True)
class Needle:
    """The fact that a prompt asks for, and where in the prompt it lies (0 = start, 1 = end)."""

    answer: str
    depth: float


@dataclass(frozen=True, slots=True)
class Turn:
    """What one request adds: its new tokens, the tokens it wants back, and the needle it asks for."""

    ids: Ids
    output_len: int
    needle: Needle | None = None
    pause_s: float = 0.0  # between the answer before and this request


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns sent one after the other, each with all before it. The first `shared` tokens are prefix number `group`."""

    index: int
    turns: tuple[Turn, ...]
    group: int
    shared: int

    @property
    def tokens(self) -> int:
        """Prompt and output tokens of the last request."""
        return sum(len(t.ids) + t.output_len for t in self.turns)


class ConversationBuilder(Protocol):
    """What makes the conversations of a block: the same ones for the same block, in every arm."""

    def prefixes(self, block: int) -> list[Ids]:
        """Prompts to prime the server's cache with."""

    def conversations(
        self, block: int, count: int, stream: int = MEASURED_STREAM, batch: int = 0
    ) -> list[Conversation]:
        """`count` conversations of `block`; a `stream` and a `batch` of its own gives tokens that no other gives."""


class Builder:
    """Draws conversations from a source.

    An agent's conversation has a context of --input-len tokens that is primed (shared by the conversations of its
    group) and, in every turn, new tokens after it."""

    def __init__(self, workload: Workload, source: Source):
        self._workload = workload
        self._source = source
        self._input = Lengths.parse(workload.input_len)
        self._output = Lengths.parse(workload.output_len)
        self._turn = Lengths.parse(workload.turn_len or "1")
        self._turns, self._groups = workload.turns or 1, workload.prefix_groups or 1
        self._agent = workload.workload == "agent"

    def prefixes(self, block: int) -> list[Ids]:
        """The shared prefixes of a block at full length, to prime the server's cache with; none without sharing."""
        if not self._workload.shared_prefix and not self._agent:
            return []
        longest = self._shared(self._input.longest)
        return [self._source.draw(self._rng(block, PREFIX_STREAM, g), longest) for g in range(self._groups)]

    def conversations(
        self, block: int, count: int, stream: int = MEASURED_STREAM, batch: int = 0
    ) -> list[Conversation]:
        """`count` conversations of `block`; a `stream` and a `batch` of its own gives tokens that no other gives."""
        rng = self._rng(block, stream, 2 * batch)
        prefixes = self.prefixes(block)
        leads = self._leads(self._rng(block, stream, 2 * batch + 1), count)
        lengths, made = self._input.draw(rng, count), []
        outputs = self._output.draw(rng, count * self._turns)
        extra = self._turn.draw(rng, count * self._turns)
        pauses = rng.exponential(self._workload.pause_s or 0.0, count * self._turns).tolist()
        for i, length in enumerate(lengths):
            group = i % self._groups
            prefix = prefixes[group][: self._shared(length)] if prefixes else np.empty(0, np.int32)
            needle, depth = None, (i + 0.5) / count  # depths stratified over the requests of a block
            facts: list[Ids] = []
            question = np.empty(0, np.int32)
            if self._workload.needles:
                facts, question, needle = self._facts(rng, depth)
            total = length + max(extra[i], LEAD) if self._agent else length
            body = self._body(rng, prefix, leads[i], facts, question, total, depth)
            turns = [Turn(body, outputs[i], needle)]
            for at in range(i + count, count * self._turns, count):
                new = self._source.draw(rng, extra[at])
                turns.append(Turn(new, outputs[at], pause_s=pauses[at]))
            made.append(Conversation(batch * count + i, tuple(turns), group, len(prefix)))
        return made

    def _shared(self, length: int) -> int:
        if self._agent:
            return length
        return min(round(length * self._workload.shared_prefix / 100), max(0, length - LEAD))

    def _rng(self, *where: int) -> np.random.Generator:
        return np.random.default_rng([self._workload.seed, *where])

    def _leads(self, rng: np.random.Generator, count: int) -> list[Ids]:
        """A pair of tokens for each request, all different; the first token differs too while the source has enough."""
        known = rng.permutation(np.unique(self._source.draw(rng, 64 * 1024)))
        pairs = (divmod(i, len(known)) for i in range(count))
        return [np.array([known[first], known[second % len(known)]], np.int32) for second, first in pairs]

    def _facts(self, rng: np.random.Generator, depth: float) -> tuple[list[Ids], Ids, Needle]:
        keys = rng.choice(np.arange(10_000, 99_999), self._workload.needles, replace=False)
        values = rng.choice(np.arange(1_000_000, 9_999_999), self._workload.needles, replace=False)
        facts = [
            self._source.encode(f" Remember: the code of vault {k} is {v}.") for k, v in zip(keys, values, strict=True)
        ]
        asked, answer = keys[-1], values[-1]
        question = self._source.encode(f" Question: what is the code of vault {asked}? The code of vault {asked} is")
        return facts, question, Needle(str(answer), depth)

    def _body(
        self,
        rng: np.random.Generator,
        prefix: Ids,
        lead: Ids,
        facts: Sequence[Ids],
        question: Ids,
        length: int,
        depth: float,
    ) -> Ids:
        """Exactly `length` tokens: prefix, lead, text with the facts in it (the asked one at `depth`), question."""
        room = length - len(prefix) - len(lead) - sum(map(len, facts)) - len(question)
        if room < 0:
            if facts:
                raise LoadError(
                    f"needles: expected room for {len(facts)} facts and a question beside the shared prefix, "
                    f"got {length} tokens; raise --input-len or lower --needles or --shared-prefix"
                )
            return np.concatenate([prefix, lead])[:length]
        text = self._source.draw(rng, room)
        others = rng.random(max(0, len(facts) - 1))
        first = len(prefix) + len(lead)
        at = [int(np.clip(d * length - first, min(SLACK, room), room)) for d in (*others, depth)][: len(facts)]
        pieces, last = [prefix, lead], 0
        for place, fact in sorted(zip(at, facts, strict=True), key=lambda pair: pair[0]):
            pieces += [text[last:place], fact]
            last = place
        return np.asarray(np.concatenate([*pieces, text[last:], question]), dtype=np.int32)


def found(needle: Needle, text: str) -> bool:
    """Whether the first number of seven digits in `text` is the answer."""
    match = re.search(r"(?<!\d)\d{7}(?!\d)", text)
    return match is not None and match[0] == needle.answer
