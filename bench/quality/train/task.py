"""What is trained on: text with facts in it, and later their questions. ` set NAME VALUE.` … ` get NAME VALUE.`"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from sglang_misa.bench.load.prompts import prose
from sglang_misa.bench.quality.words import NAMES, VALUES
from sglang_misa.random_model import BOS, EOS, PAD

PROSE = 400_000  # characters
SAMPLE, LISTED = 1000, 2000  # texts that a tokenizer is trained on; the listed words as often, to be a token each
LISTED_WORDS = tuple(f" {word}" for word in (*NAMES, *VALUES, "set", "get"))
MIN_FILE, MAX_FILE = 1_500, 300_000  # bytes
SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt", ".h", ".c", ".cpp"}


@dataclass(frozen=True)
class Corpus:
    """A tokenizer, a stream of text, and the whole words that names and values are drawn from."""

    tokenizer: Tokenizer
    stream: NDArray[np.int64]
    names: NDArray[np.int64]
    values: NDArray[np.int64]
    words: int  # of a name, and of a value, at most

    def batch(
        self, rng: np.random.Generator, rows: int, tokens: int, pairs: int
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """(ids, which of them are asked values), [rows, tokens] each: text with `pairs` facts and questions a row.

        A row's names and values have 1 to `words` words; names of one word are not asked twice, so there may be fewer.
        """
        starts = rng.integers(0, len(self.stream) - tokens, rows)
        ids = np.stack([self.stream[start : start + tokens] for start in starts])
        asked = np.zeros_like(ids, dtype=bool)
        for row, found in zip(ids, asked, strict=True):
            words = int(rng.integers(1, self.words + 1))
            self._ask(rng, row, found, words, min(pairs, len(self.names)) if words == 1 else pairs)
        return ids, asked

    def _ask(
        self, rng: np.random.Generator, row: NDArray[np.int64], found: NDArray[np.bool_], words: int, pairs: int
    ) -> None:
        """Writes facts and questions over `row`, and marks the questions' values in `found`."""
        lead, get, stop = (np.tile(self.tokenizer.encode(text).ids, (pairs, 1)) for text in (" set", " get", "."))
        keys = rng.choice(self.names, (pairs, words), replace=words > 1)
        answers = rng.choice(self.values, (pairs, words))
        fact, question = (np.concatenate((word, keys, answers, stop), axis=1) for word in (lead, get))
        span = max(fact.shape[1], question.shape[1])
        if 2 * pairs > len(row) // span:
            raise ValueError(f"expected room for {pairs} facts and questions in {len(row)} tokens; ask for fewer")
        places = np.sort(rng.choice(len(row) // span, (pairs, 2), replace=False), axis=1) * span
        row[places[:, :1] + np.arange(fact.shape[1])] = fact
        row[places[:, 1:] + np.arange(question.shape[1])] = question
        found[places[:, 1:] + get.shape[1] + words + np.arange(words)] = True


def small() -> Corpus:
    """The built-in prose, and the lists of words, each word one token."""
    text = prose(0, PROSE)
    plain = sorted(set(re.findall(r" ?[A-Za-z]+|[^A-Za-z ]", text)))
    tokenizer = _tokenizer([*dict.fromkeys([*LISTED_WORDS, *plain])])
    ids = np.array(tokenizer.encode(text).ids)
    names, values = (np.array([tokenizer.token_to_id(f"Ġ{w}") for w in part]) for part in (NAMES, VALUES))
    return Corpus(tokenizer, ids, names, values, words=1)


def _tokenizer(words: Sequence[str]) -> Tokenizer:
    """Bytes, and each of `words` by merges from its left: one token where it stands whole."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)}
    merges: dict[tuple[str, str], None] = {}  # in order
    for word in words:
        spelled = word.replace(" ", "Ġ")
        for end in range(2, len(spelled) + 1):
            vocab.setdefault(spelled[:end], len(vocab))
            merges.setdefault((spelled[: end - 1], spelled[end - 1]), None)
    return _finish(Tokenizer(models.BPE(vocab=vocab, merges=list(merges))))


def _finish(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in (BOS, EOS, PAD)])
    return tokenizer


def large(folders: Sequence[Path], vocab: int, limit: int) -> Corpus:
    """Text files under `folders`, up to `limit` characters, with a tokenizer trained on them.

    Raises ValueError where there is too little text.
    """
    texts, total = [], 0
    for file in _files(folders):
        texts.append(file.read_text(encoding="utf-8", errors="ignore"))
        total += len(texts[-1])
        if total > limit:
            break
    if total < limit // 10:
        raise ValueError(f"expected {limit // 10} characters of text under {folders}, got {total}; name more folders")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab - 3, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*texts[:: max(1, len(texts) // SAMPLE)], *["".join(LISTED_WORDS)] * LISTED], trainer)
    tokenizer = _finish(tokenizer)
    encoded = (tokenizer.encode_batch_fast(texts[start : start + SAMPLE]) for start in range(0, len(texts), SAMPLE))
    stream = np.concatenate([np.array(text.ids) for batch in encoded for text in batch])
    words = np.array(sorted(i for word, i in tokenizer.get_vocab().items() if re.fullmatch(r"Ġ[a-z]{3,}", word)))
    return Corpus(tokenizer, stream, words, words, words=2)


def _files(folders: Sequence[Path]) -> Iterator[Path]:
    for folder in folders:
        for file in sorted(folder.rglob("*")):
            if file.suffix in SUFFIXES and file.is_file() and MIN_FILE < file.stat().st_size < MAX_FILE:
                yield file
