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


def test_a_full_disk_is_told():
    with open("/dev/full", "w") as disk:
        command = [sys.executable, "-m", "sglang_misa.bench.load.results"]
        ended = subprocess.run(command, stdout=disk, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1
    assert "No space left" in ended.stderr
