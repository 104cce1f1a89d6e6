"""The example that proves a server is on, against one that is."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROVE = Path(__file__).parents[2] / "examples/prove_it_is_on.py"


@pytest.mark.serving
def test_a_server_is_proven_to_select(server: Any, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text(server.key)
    command = [sys.executable, PROVE, f"http://127.0.0.1:{server.port}", "--key-file", key]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "prefill: misa: proven" in run.stdout
    assert "decode: hisa: proven" in run.stdout
