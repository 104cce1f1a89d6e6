"""The short form of `make soak`: a pool too small for its load, a host cache, faults, and the canary on `raise`."""

from pathlib import Path

import pytest

from sglang_misa.bench import soak

pytestmark = pytest.mark.serving

MINUTES = 0.4


def test_page_statistics_stay_those_of_the_keys(model: Path, environ: dict[str, str], tmp_path: Path) -> None:
    scale = soak.SCALES["cpu"]
    report = soak.run(model, tmp_path, MINUTES, scale, scale.server, environ)
    print(report)
    assert report.problems() == []
    assert report.pages_verified > 1000
