"""JSON Lines of a user: every program reads and refuses them alike, with the file, the line and what to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang_misa.bench.load import dataset, trace
from sglang_misa.bench.load.settings import LoadError, Workload
from sglang_misa.bench.quality import questions
from sglang_misa.calibrate import prompts
from sglang_misa.config import ConfigError

ROW = '{"prompt": "a", "outputs": ["b"], "timestamp": 0, "input_length": 1, "output_length": 1}'
READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "calibrate": ("--prompts: ", lambda path: prompts.read([path])),
    "dataset": ("dataset: ", lambda path: dataset.read(Workload(dataset=str(path)))),
    "trace": ("trace: ", lambda path: trace.read(Workload(trace=str(path)))),
    "agree": ("", lambda path: questions.prompts(path, lambda text: [1], 1, 1)),
    "tasks": ("", lambda path: questions.tasks(path.parent, lambda text: [1], 1)),
}


@pytest.mark.parametrize("reader", READERS)
def test_lines_are_read(tmp_path: Path, reader: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(f"\ufeff{ROW}\r\n\n{ROW}".encode())
    assert len(READERS[reader][1](path)) == 2


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b'{"prompt": "a', ':3: expected one JSON object, got \'{"prompt": "a\' (Unterminated string'),
        (b"[1]", ":3: expected one JSON object, got [1]; correct it"),
        (b"[" * 100_000, ":3: expected one JSON object, got '[[[["),
        (b"\xff", ": expected a readable UTF-8 file, got 'utf-8' codec can't decode"),
    ],
    ids=["cut", "list", "deep", "no text"],
)
@pytest.mark.parametrize("reader", READERS)
def test_a_line_is_refused_alike(tmp_path: Path, reader: str, data: bytes, told: str) -> None:
    path, (prefix, read) = tmp_path / "a.jsonl", READERS[reader]
    path.write_bytes(ROW.encode() + b"\n\n" + data)
    with pytest.raises((ConfigError, LoadError)) as caught:
        read(path)
    assert f"{prefix}{path}{told}" in str(caught.value)


@pytest.mark.parametrize("reader", ["calibrate", "agree"])
def test_a_prompt_that_is_no_text_is_named(tmp_path: Path, reader: str) -> None:
    path, (prefix, read) = tmp_path / "a.jsonl", READERS[reader]
    path.write_text(f'{ROW}\n{{"question": 1}}')
    with pytest.raises((ConfigError, LoadError)) as caught:
        read(path)
    told = f"""{prefix}{path}:2: expected a text as "prompt" or "text", got ['question']; rename the field"""
    assert told in str(caught.value)
