"""Output whose reader has gone: what a program does and its exit status stay the same."""

import json
import os
import subprocess
import sys

import pytest

from sglang_misa import random_model

CHECK = "sglang_misa.launch_server --check --misa-preset fast --device cpu --model-path"


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (f"{CHECK} {{model}}", 0),
        (f"{CHECK} {{model}} --pp-size 2", 2),
        ("sglang_misa.bench.load --help", 0),
        ("sglang_misa.bench.load.results", 0),
    ],
)
def test_the_status_is_the_programs_own(tmp_path, words, status):
    (tmp_path / "config.json").write_text(
        json.dumps(random_model.config(random_model.Shape(layers=4, index_topk=2048)))
    )
    source, sink = os.pipe()
    os.close(source)
    command = [sys.executable, "-W", "ignore", "-m", *words.format(model=tmp_path).split()]
    ended = subprocess.run(command, stdout=sink, stderr=subprocess.PIPE, text=True)
    os.close(sink)
    assert (ended.returncode, ended.stderr) == (status, "")


@pytest.mark.parametrize("words", ["sglang_misa.bench.load.results", f"{CHECK} owner/model"])
def test_a_full_disk_is_told(words):
    with open("/dev/full", "w") as disk:
        command = [sys.executable, "-W", "ignore", "-m", *words.split()]
        ended = subprocess.run(command, stdout=disk, stderr=subprocess.PIPE, text=True)
    told = "standard output: expected to write to it, got [Errno 28] No space left on device; make room, or redirect it"
    assert (ended.returncode, ended.stderr) == (2, f"{told}\n")


def test_a_refusal_that_nobody_reads_is_one():
    with open("/dev/full", "w") as disk:
        ended = subprocess.run([sys.executable, "-m", *CHECK.split(), "."], stderr=disk)
    assert ended.returncode == 2
