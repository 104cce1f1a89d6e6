"""Questions: prompts as token ids, the same for every arm, and what a right answer contains."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sglang_misa import text_files
from sglang_misa.bench.load.prompts import Source
from sglang_misa.bench.load.settings import LoadError
from sglang_misa.bench.quality.words import NAMES, VALUES

Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True)
class Template:
    """How a fact is told and asked for."""

    fact: str
    question: str


SPREAD = 512  # tokens: the largest block of a preset

_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
WORDS = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")

TEMPLATES = {
    "pass": Template(
        " The pass word of {name} is {value}.", " What is the pass word of {name}? The pass word of {name} is"
    ),
    "note": Template(" Remember: {name} keeps a {value}.", " Question: what does {name} keep? Answer: {name} keeps a"),
    "pairs": Template(" set {name} {value}.", " get {name}"),
}


@dataclass(frozen=True)
class Question:
    """One prompt. answers: strings that a right answer holds. length: tokens asked for; depth: 0 = start, 1 = end.

    task: what its score is averaged with.
    """

    name: str
    ids: tuple[int, ...]
    new_tokens: int
    answers: tuple[str, ...] = ()
    measure: str = "found"  # or f1
    length: int = 0
    depth: float = 0.0
    task: str = ""

    def digest(self) -> str:
        text = f"{self.ids}{self.new_tokens}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def score(self, text: str) -> float:
        """0 to 1: the share of the answers that `text` holds, or its best F1 over words with one of them."""
        if self.measure == "f1":
            return max(_f1(text, answer) for answer in self.answers)
        return sum(_holds(text, answer) for answer in self.answers) / len(self.answers)


def _holds(text: str, answer: str) -> bool:
    """Whether the words of an answer stand in a text one after another; of one without words, its characters."""
    words = _words(answer)
    return f" {' '.join(words)} " in f" {' '.join(_words(text))} " if words else answer.strip() in text


def _words(text: str) -> list[str]:
    """Words in lower case; of scripts that set no blanks between words each character is one."""
    return WORDS.findall(text.lower())


def _f1(text: str, answer: str) -> float:
    got, wanted = Counter(_words(text)), Counter(_words(answer))
    shared = (got & wanted).total()
    return 2 * shared / (got.total() + wanted.total()) if shared else 0.0


def needles(
    source: Source,
    template: Template,
    lengths: Sequence[int],
    depths: Sequence[float],
    repeats: int,
    others: int,
    new_tokens: int,
    seed: int,
) -> Iterator[Question]:
    """`repeats` questions at each length and depth, every one over other text, among `others` facts that are not asked.

    The fact that is asked for lies within SPREAD tokens of its depth, or fewer where depths are closer: eighths of a
    power of two would all be the edge of a block. Raises LoadError where facts and question do not fit.
    """
    for length in lengths:
        for at, depth in enumerate(depths):
            for turn in range(repeats):
                rng = np.random.default_rng([seed, length, at, turn])
                names = rng.choice(NAMES, others + 1, replace=False)
                values = rng.choice(VALUES, others + 1, replace=False)
                pairs = zip(names, values, strict=True)
                facts = [source.encode(template.fact.format(name=n, value=v)) for n, v in pairs]
                question = source.encode(template.question.format(name=names[0]))
                if (least := len(source.encode(f" {values[0]}"))) > new_tokens:
                    raise LoadError(
                        f"new_tokens: expected room for the answer, {values[0]}, which is {least} tokens, got "
                        f"{new_tokens}; raise --new-tokens"
                    )
                room = length - len(question) - sum(map(len, facts))
                if room < 0:
                    raise LoadError(
                        f"lengths: expected room for {others + 1} facts and a question, got {length} tokens; "
                        "ask for longer prompts or fewer --others"
                    )
                text = source.draw(rng, room)
                elsewhere = rng.integers(0, room + 1, others).tolist()
                spread = min(SPREAD, room // len(depths))
                places = [round(depth * (room - spread)) + int(rng.integers(spread + 1)), *elsewhere]
                pieces, last = [], 0
                for place, fact in sorted(zip(places, facts, strict=True), key=lambda pair: pair[0]):
                    pieces += [text[last:place], fact]
                    last = place
                ids = np.concatenate([*pieces, text[last:], question]).tolist()
                name = f"{length} · {depth:.2f} · {turn + 1}"
                yield Question(name, tuple(ids), new_tokens, (str(values[0]),), length=length, depth=depth)


def prompts(path: Path, tokenize: Tokenize, new_tokens: int, least: int) -> list[Question]:
    """The user's prompts: JSON Lines with `prompt` or `text`, or a text file that is one prompt. Raises LoadError.

    least: tokens under which a prompt is too short, as stock DSA would run in both arms.
    """
    found = []
    for number, text in enumerate(text_files.prompts(path, LoadError), 1):
        ids = tuple(tokenize(text)) if text.strip() else ()
        if len(ids) < least:
            raise LoadError(
                f"{path}, prompt {number}: expected at least {least} tokens, under which nothing is selected, "
                f"got {len(ids)}; give longer prompts, or lower --least"
            )
        found.append(Question(f"prompt {number}", ids, new_tokens, length=len(ids)))
    if not found:
        raise LoadError(f"{path}: expected prompts, got an empty file; write one JSON object a line")
    return found


def tasks(folder: Path, tokenize: Tokenize, new_tokens: int) -> list[Question]:
    """Questions of a folder of JSON Lines, RULER's (input, outputs) or LongBench's (context, input, answers).

    Of RULER's each output must be found; of LongBench's the best F1 counts. Raises LoadError.
    """
    found = []
    for file in task_files(folder):
        for number, (where, row) in enumerate(text_files.json_lines(file, LoadError), 1):
            measure, answers = ("found", row["outputs"]) if "outputs" in row else ("f1", row.get("answers"))
            if not isinstance(answers, list) or not answers or not all(str(answer).strip() for answer in answers):
                raise LoadError(f"{where}: expected outputs or answers, got {sorted(row)}; see --help")
            text = "\n\n".join(str(row[part]) for part in ("context", "input", "prompt") if row.get(part))
            ids = tuple(tokenize(text))
            if not ids:
                raise LoadError(f"{where}: expected a prompt in input or prompt, got none; add it")
            told = tuple(str(answer) for answer in answers)
            name = f"{file.stem} · {number}"
            found.append(Question(name, ids, new_tokens, told, measure, length=len(ids), task=file.stem))
    if not found:
        raise LoadError(f"{folder}: expected questions in its *.jsonl files, got none; name another folder")
    return found


def task_files(folder: Path) -> list[Path]:
    """The *.jsonl files of a folder, in order. Raises LoadError where there is none."""
    if not (files := sorted(folder.glob("*.jsonl"))):
        raise LoadError(f"folder: expected a folder with *.jsonl files, got {folder} without; correct --folder")
    return files
