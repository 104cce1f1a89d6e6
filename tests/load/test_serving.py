"""A small A/B of `dsa` against `misa` on SGLang's real server, with the tiny model on the CPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from sglang_misa.bench.load.cli import main
from sglang_misa.bench.load.shell import OK

LAUNCHER = "sglang_misa.launch_server"


@pytest.mark.serving
@pytest.mark.skipif(
    importlib.util.find_spec("sglang") is None or importlib.util.find_spec(LAUNCHER) is None,
    reason="needs the sglang extra and the launcher",
)
def test_dsa_against_misa_on_a_real_server(tmp_path: Path) -> None:
    """One server after the other; each says what it ran, and its cached_tokens are those that were planned."""
    from sglang_misa import random_model

    model = random_model.ensure(tmp_path, random_model.CPU)
    launch = f"OMP_NUM_THREADS=1 {sys.executable} -m {LAUNCHER} --model-path {model} --device cpu --port {{port}}"
    launch += " --enable-metrics --misa-prefill-min-len 256 --misa-preset"
    arms = ["--a", f"{launch} dsa", "--b", f"{launch} misa", "--a-expect", "dsa", "--b-expect", "misa"]
    shape = [
        "--text",
        "ids",
        "--id-range",
        "3",
        "250",
        "--input-len",
        "1k",
        "--output-len",
        "4",
        "--shared-prefix",
        "50",
    ]
    bounds = ["--requests", "3", "--warmup", "1", "--blocks", "1", "--max-lag-s", "5"]
    out = tmp_path / "ab"
    assert main(["ab", "--ab-mode", "alternate", *arms, *shape, *bounds, "--out", str(out)]) == OK
    result = json.loads((out / "results.json").read_text())
    for arm in result["arms"]:
        assert arm["errors"] == {}
        assert arm["figures"]["prompt_error_max"] == 0
        assert arm["figures"]["cached_share"] == arm["figures"]["cached_wanted_share"] == 0.5
        assert arm["figures"]["queue_s_mean"] >= 0
    units = {u["arm"]: u for u in (json.loads(p.read_text()) for p in (out / "units").iterdir())}
    assert units["B"]["misa"]["prefill.misa"] > 0
    assert not any("misa" in path for path in units["A"]["misa"])
