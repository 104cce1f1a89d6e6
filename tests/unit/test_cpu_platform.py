"""The CPU platform's bounds on a worker's memory hold for the libraries that they are meant for."""

import os
import subprocess
import sys

import pytest

from sglang_misa.cpu.platform import BOUNDS

MIB = 1 << 20
LENGTHS = 300  # of prompts
PROGRAM = f"""
import os, torch
from sglang_misa.bench.resident import family
torch.set_num_threads(1)
weights = torch.randn(512, 256).bfloat16(), torch.randn(256, 512).bfloat16()
def serve(length):
    x = torch.randn(length, 256).bfloat16()
    for weight in weights:
        x = torch.nn.functional.linear(x, weight)
def own():
    return family(os.getpid())[os.getpid()].resident["anon"]
serve(1)
before = own()
for length in range(2, 2 + {LENGTHS}):
    serve(length)
print(own() - before)
"""


def grown(**environ: str) -> int:
    """Bytes that a process's memory grows by over prompts of so many lengths."""
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, **environ}, stdout=subprocess.PIPE, text=True, check=True
    )
    return int(ran.stdout)


def test_memory_does_not_grow_with_the_lengths_of_prompts() -> None:
    unbounded = grown(**dict.fromkeys(BOUNDS, "1024"))
    if unbounded < 100 * MIB:
        pytest.skip("oneDNN keeps little on this CPU")
    assert grown(**BOUNDS) < unbounded / 3
