"""A wheel holds every package of the checkout, and its programs say which extra is missing."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

from sglang_misa import missing_packages
from sglang_misa.calibrate.costs import SHIPPED
from sglang_misa.demo import MODEL

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("sglang_misa", "bench")
NEED_NOTHING = {"sglang_misa/launch_server.py", "sglang_misa/procs.py", "sglang_misa/status.py"}
PROGRAMS = sorted(
    str(path)
    for folder in FOLDERS
    for file in (ROOT / folder).rglob("*.py")
    if '__name__ == "__main__"' in file.read_text(encoding="utf-8")
    and str(path := file.relative_to(ROOT)) not in NEED_NOTHING
)


@pytest.fixture
def setuptools():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


def test_every_folder_with_modules_is_packaged(setuptools):
    links = [link for link in (ROOT / "sglang_misa").iterdir() if link.is_symlink()]
    modules = [*(ROOT / "sglang_misa").rglob("*.py"), *(file for link in links for file in link.rglob("*.py"))]
    assert set(setuptools["packages"]) == {".".join(file.relative_to(ROOT).parent.parts) for file in modules}


def test_files_that_are_read_are_packaged(setuptools):
    folders = {package: ROOT.joinpath(*package.split(".")) for package in setuptools["packages"]}
    patterns = [(package, pattern) for package, found in setuptools["package-data"].items() for pattern in found]
    packaged = {file for package, pattern in patterns for file in folders[package].glob(pattern)}
    template = files("sglang_misa.bench.load") / "template.html"
    assert {file.resolve() for file in packaged} >= {file.resolve() for file in (*MODEL.iterdir(), SHIPPED, template)}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_without_its_extra_says_so(program, tmp_path):
    module = program.removeprefix("sglang_misa/").removesuffix(".py").removesuffix("/__main__").replace("/", ".")
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules |= dict.fromkeys({missing_packages.PACKAGES})")
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", f"sglang_misa.{module}"]
    run = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert run.returncode == missing_packages.MISSING
    said = rf"sglang_misa.{module}: expected the package (\w+), got none; .*\[(bench|bench,sglang)\]"
    assert re.match(said, run.stderr), run.stderr
    assert len(run.stderr.splitlines()) == 1


def test_the_extras_bring_what_programs_are_told_to_install():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    brought = {re.split(r"[^\w]", line)[0] for name in ("bench", "sglang") for line in listed[name]}
    assert brought <= missing_packages.PACKAGES
