"""Examples run as their page says."""

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_one_kernel_runs_without_a_gpu_by_the_reference():
    run = subprocess.run([sys.executable, EXAMPLES / "one_kernel.py"], capture_output=True, text=True, check=True)
    assert "of DSA's tokens are kept" in run.stdout


def test_the_page_names_every_example():
    page = (EXAMPLES / "README.md").read_text()
    assert [file.name for file in EXAMPLES.glob("*.py") if f"]({file.name})" not in page] == []
