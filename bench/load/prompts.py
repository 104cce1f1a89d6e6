"""Tokens of prompts: random ids, or prose (built in or from a file) put through the server's own tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sglang_misa.bench.load.settings import LoadError, Workload

Ids = NDArray[np.int32]
CHARACTERS_PER_TOKEN = 6  # generous for prose, so that a corpus is longer than the longest prompt
MIN_CORPUS = 4096  # tokens below which a text repeats itself too much
WORDS = {
    "who": "the archivist|a ferryman|the night watch|our surveyor|a glassblower|the clockmaker|an orchard keeper|"
    "the harbour pilot|a bookbinder|the cartographer|a lighthouse crew|the miller|two apprentices|the botanist",
    "did": "measured|carried|repaired|described|forgot|painted|counted|buried|sold|weighed|followed|opened|traded|drew",
    "what": "a copper kettle|the eastern wall|seven letters|an unlit lantern|the old calendar|a crate of pears|"
    "the river gauge|a broken violin|three maps|the granary door|a sealed jar|the winter ledger|a length of rope",
    "where": "behind the chapel|near the ford|under the long bridge|at the market gate|beside the kiln|"
    "on the north quay|in the walled garden|above the tannery|along the salt road|inside the customs house|"
    "by the empty well",
    "when": "before dawn|after the fair|during the flood|in the third week of March|at noon|when the bells stopped|"
    "on the shortest day|while the fog held|before the harvest|late in the evening|a year later",
}


class Source(Protocol):
    """Where prompt tokens come from."""

    def draw(self, rng: np.random.Generator, count: int) -> Ids:
        """`count` token ids of running text, int32 [count]."""

    def encode(self, text: str) -> Ids:
        """Token ids of `text`, int32 [n]. Raises LoadError when there is no tokenizer."""


class RandomIds:
    """Uniform token ids: no tokenizer needed, no text meant."""

    def __init__(self, low: int, high: int):
        if not 0 <= low < high - 1:
            raise LoadError(f"id_range: expected two ids with low + 1 < high, got {low} {high}; see --id-range")
        self._range = low, high

    def draw(self, rng: np.random.Generator, count: int) -> Ids:
        return rng.integers(*self._range, count, dtype=np.int32)

    def encode(self, text: str) -> Ids:
        raise LoadError("text: expected a tokenizer, got --text ids; use --text builtin or a file")


class TextIds:
    """Windows of one tokenized text, each from its own place; a window that reaches the end goes on at the start."""

    def __init__(self, text: str, tokenize: Callable[[str], list[int]]):
        self._tokenize = tokenize
        self._corpus = np.array(tokenize(text), dtype=np.int32)
        if len(self._corpus) < MIN_CORPUS:
            raise LoadError(
                f"text: expected at least {MIN_CORPUS} tokens, got {len(self._corpus)}; "
                "give a longer file or --text builtin"
            )

    def draw(self, rng: np.random.Generator, count: int) -> Ids:
        start = int(rng.integers(len(self._corpus)))
        return np.take(self._corpus, np.arange(start, start + count), mode="wrap")

    def encode(self, text: str) -> Ids:
        return np.array(self._tokenize(text), dtype=np.int32)


def source_of(workload: Workload, tokens: int, tokenize: Callable[[str], list[int]]) -> Source:
    """The source that `workload` names, with at least `tokens` of text where it is built in."""
    if workload.text == "ids":
        return RandomIds(*workload.id_range)
    if workload.text == "builtin":
        return TextIds(prose(workload.seed, CHARACTERS_PER_TOKEN * max(tokens, MIN_CORPUS)), tokenize)
    return TextIds(_read(workload.text), tokenize)


def check_text(workload: Workload) -> None:
    """Raise LoadError where the text of `workload` cannot be read, or its ids are no range."""
    if workload.text == "ids":
        RandomIds(*workload.id_range)
    elif workload.text != "builtin":
        _read(workload.text)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(
            f"text: expected builtin, ids or a readable UTF-8 file, got {path} ({error}); change --text"
        ) from None


def prose(seed: int, characters: int) -> str:
    """At least `characters` of seeded prose: grammatical, dull, without facts that could be a needle's answer."""
    rng = np.random.default_rng([seed, 0x5E17])
    columns = [words.split("|") for words in WORDS.values()]
    shortest = sum(min(len(w) for w in column) + 1 for column in columns)
    picks = [[column[i] for i in rng.integers(len(column), size=characters // shortest + 1)] for column in columns]
    sentences = [
        f"{who} {did} {what} {where} {when}.".capitalize() for who, did, what, where, when in zip(*picks, strict=True)
    ]
    return " ".join(sentences)
