"""The short form of `make soak`: a pool too small for its load, a host cache, faults, and the canary on `raise`."""

from pathlib import Path

import pytest

from sglang_misa.bench import soak

pytestmark = pytest.mark.serving

ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # two would wait for each other in a model so small
MINUTES = 0.15  # each client ends the turn that it is in, and each of them began with another kind


def test_page_statistics_stay_those_of_the_keys(model: Path, environ: dict[str, str], tmp_path: Path) -> None:
    scale = soak.SCALES["cpu"]
    report = soak.run(model, tmp_path, tmp_path / "log", MINUTES, scale, scale.server, environ | ONE_THREAD)
    print(report)
    assert report.problems() == []
    assert report.pages_verified > 1000
