"""One list of SGLang's versions: what else names one agrees with it."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from sglang_misa import versions

ROOT = Path(__file__).parents[2]
NEIGHBOURS = [f"0.5.{patch}" for patch in range(14, 26)] + ["0.5.20.post1", "0.6.0"]


def test_the_extra_allows_what_is_supported_and_nothing_else():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (sglang,) = (r for r in map(Requirement, extras["sglang"]) if r.name == "sglang")
    assert tuple(sglang.specifier.filter(NEIGHBOURS)) == versions.SUPPORTED


@pytest.mark.parametrize(
    ("lock", "version"), [("requirements.lock", versions.SUPPORTED[-1]), ("requirements-0.5.17.lock", "0.5.17")]
)
def test_a_lock_pins_the_version_it_is_for(lock, version):
    pinned = dict(line.split("==") for line in (ROOT / lock).read_text().split("\n") if "==" in line)
    assert pinned["sglang"] == version


def test_the_image_is_of_a_supported_version():
    (version,) = re.findall(r"^ARG SGLANG_IMAGE=.*:v([\d.]+)$", (ROOT / "docker" / "Dockerfile").read_text(), re.M)
    assert version in versions.SUPPORTED


@pytest.mark.parametrize("version", versions.SUPPORTED)
def test_a_gpu_wants_a_version_verified_on_one_or_the_users_word(version):
    refused = versions.problem(version, "cuda", allow_unverified=False)
    assert (refused is None) == ("gpu" in versions.VERIFIED[version])
    assert versions.problem(version, "cuda", allow_unverified=True) is None
    assert versions.problem(version, "cpu", allow_unverified=False) is None
