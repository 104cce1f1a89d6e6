"""Prompts from files: JSON Lines with a prompt and a length, or conversations as ShareGPT has them.

A row is `{"prompt": "…", "output_len": 128}`, or `{"conversations": [{"from": "human", "value": "…"}, …]}`, or the
same as `messages` with `role` and `content`. A reply in the data is not sent: its length is what is asked for. What
a system or a tool said is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sglang_misa import text_files
from sglang_misa.bench.load.prompts import Ids, Source
from sglang_misa.bench.load.replies import whole
from sglang_misa.bench.load.settings import Lengths, LoadError, Workload
from sglang_misa.bench.load.workload import MEASURED_STREAM, Conversation, Turn

SUFFIXES = (".jsonl", ".json")
OUTPUT_NAMES = ("output_len", "output_length", "max_tokens", "output_tokens")
PROMPT_NAMES = ("prompt", "input", "text", "question")
ASKING = {"human", "user"}
DATASET_STREAM = 0xDA7A


@dataclass(frozen=True)
class Exchange:
    """One prompt, with the reply or the length that the data has for it."""

    prompt: str
    reply: str | None
    output_len: int | None


def read(workload: Workload) -> list[tuple[Exchange, ...]]:
    """Conversations of the file or the folder of `workload`. Raises LoadError."""
    path = Path(workload.dataset or "")
    files = sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES) if path.is_dir() else [path]
    found = [c for file in files for row in _rows(file) if (c := _conversation(*row)[: workload.turns])]
    if not found:
        raise LoadError(
            f"dataset: expected rows with one of {', '.join(PROMPT_NAMES)}, or with conversations or messages, "
            f"got none in {path}"
        )
    return found


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, row) of each row."""
    if file.suffix != ".json":
        yield from text_files.json_lines(file, _refused)
        return
    try:
        data = json.loads(text_files.read(file, _refused))
    except (ValueError, RecursionError) as error:
        raise _refused(f"{file}: expected JSON, got {error}; correct it") from None
    for number, row in enumerate(data if isinstance(data, list) else [data], 1):
        yield f"{file}, row {number}", row


def _conversation(where: str, row: Any) -> tuple[Exchange, ...]:
    try:
        return tuple(_exchanges(row))
    except (ValueError, OverflowError, TypeError, AttributeError) as error:
        raise _refused(f"{where}: expected a prompt or a conversation, got {error}; correct it") from None


def _refused(problem: str) -> LoadError:
    return LoadError(f"dataset: {problem}")


def _exchanges(row: Any) -> Iterator[Exchange]:
    if not isinstance(row, dict):
        return
    spoken = row.get("conversations") or row.get("conversation") or row.get("messages")
    if isinstance(spoken, list):
        said = [(str(m.get("from", m.get("role"))), _written(m.get("value", m.get("content")))) for m in spoken]
        for i, (who, text) in enumerate(said):
            if who in ASKING and text.strip():
                answered = i + 1 < len(said) and said[i + 1][0] not in ASKING
                yield Exchange(text, said[i + 1][1] if answered else None, None)
        return
    prompt = next((row[name] for name in PROMPT_NAMES if isinstance(row.get(name), str)), None)
    if prompt:
        wanted = next((_tokens(row[name]) for name in OUTPUT_NAMES if row.get(name) is not None), None)
        reply = row.get("output")
        yield Exchange(whole(prompt), whole(reply) if isinstance(reply, str) else None, wanted)


def _tokens(length: Any) -> int:
    """A length from 1 on, which some data have as a text or as 128.0. Raises ValueError, TypeError, OverflowError."""
    tokens = int(length)
    if tokens < 1 or isinstance(length, bool) or (isinstance(length, float) and length != tokens):
        raise ValueError(f"an output length of {length}")
    return tokens


def _written(content: Any) -> str:
    """The text of a message, whose content may be parts, some of them no text. Raises ValueError for something else."""
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    if len(texts) < len(parts) or any(not isinstance(text, str | None) for text in texts):
        raise ValueError(f"a message of {str(content)[:80]!r}")
    return whole(text or "" for text in texts)


class DatasetBuilder:
    """Conversations drawn from a data set, every block with others while there are enough."""

    def __init__(self, workload: Workload, source: Source):
        self._workload, self._source = workload, source
        self._output = Lengths.parse(workload.output_len)
        self._rows = read(workload)

    def prefixes(self, block: int) -> list[Ids]:
        """None: only what the data shares is shared."""
        return []

    def conversations(
        self, block: int, count: int, stream: int = MEASURED_STREAM, batch: int = 0
    ) -> list[Conversation]:
        """`count` conversations; those over --max-len are passed over. Raises LoadError where none is short enough."""
        order = np.random.default_rng([self._workload.seed, DATASET_STREAM, stream]).permutation(len(self._rows))
        rng = np.random.default_rng([self._workload.seed, DATASET_STREAM, stream, block, batch])
        made: list[Conversation] = []
        place = (block + batch) * count
        for tried in range(len(self._rows) + count):
            if len(made) == count:
                return made
            turns = self._turns(self._rows[order[(place + tried) % len(order)]], rng)
            if (
                self._workload.max_len is None
                or sum(len(t.ids) + t.output_len for t in turns) <= self._workload.max_len
            ):
                made.append(Conversation(batch * count + len(made), turns, 0, 0))
        if len(made) == count:
            return made
        raise LoadError(
            f"dataset: expected {count} conversations of at most {self._workload.max_len} tokens, got {len(made)}; "
            "raise --max-len or lower --requests"
        )

    def _turns(self, exchanges: tuple[Exchange, ...], rng: np.random.Generator) -> tuple[Turn, ...]:
        turns = []
        for exchange in exchanges:
            output = exchange.output_len
            if output is None and exchange.reply:
                output = len(self._source.encode(exchange.reply))
            turns.append(Turn(self._source.encode(exchange.prompt), output or self._output.draw(rng, 1)[0]))
        return tuple(turns)
