"""A small A/B by the load test: stock DSA on a server of its own against MISA on that of the folder."""

import json
import sys

import pytest

from sglang_misa.bench.load.cli import main
from sglang_misa.bench.load.shell import OK

pytestmark = pytest.mark.serving


def test_dsa_against_misa(server, model, environ, tmp_path):
    """Each says what it ran, and its cached_tokens are those that were planned."""
    (tmp_path / "key").write_text(server.key)
    stock = (
        f"OMP_NUM_THREADS=1 PYTHONPATH={environ['PYTHONPATH']} {sys.executable} -m sglang_misa.launch_server "
        f"--model-path {model} --device cpu --port {{port}} --enable-metrics --misa-preset dsa"
    )
    arms = ["--a", stock, "--a-expect", "dsa", "--b", f"http://127.0.0.1:{server.port}", "--b-expect", "misa"]
    asked = ["--text", "ids", "--id-range", "3", "250", "--input-len", "1k", "--output-len", "4"]
    asked += ["--shared-prefix", "50", "--requests", "3", "--warmup", "1", "--blocks", "1"]
    access = ["--api-key-file", str(tmp_path / "key"), "--max-lag-s", "5", "--out", str(tmp_path)]
    assert main(["ab", *arms, *asked, *access]) == OK
    for arm in json.loads((tmp_path / "results.json").read_text())["arms"]:
        assert arm["errors"] == {}
        assert arm["figures"]["prompt_error_max"] == 0
        assert arm["figures"]["cached_share"] == arm["figures"]["cached_wanted_share"] == 0.5
        assert arm["figures"]["queue_s_mean"] >= 0
    units = {unit["arm"]: unit for unit in (json.loads(path.read_text()) for path in tmp_path.glob("units/*"))}
    assert units["B"]["misa"]["prefill.misa"] > 0
    assert not any("misa" in path for path in units["A"]["misa"])
