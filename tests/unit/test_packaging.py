"""A wheel holds every package of the checkout, and says which extra is missing."""

import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

from sglang_misa.calibrate.costs import SHIPPED
from sglang_misa.demo import MODEL

ROOT = Path(__file__).resolve().parents[2]


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


def test_the_load_test_names_the_extra_that_it_needs():
    code = (
        "import runpy, sys; sys.modules['tyro'] = None; runpy.run_module('sglang_misa.bench.load', run_name='__main__')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr == "bench.load: expected the extra bench, got no tyro; install sglang-misa[bench]\n"
