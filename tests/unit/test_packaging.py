"""A wheel holds every package of the checkout."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_folder_with_modules_is_packaged():
    named = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    links = [link for link in (ROOT / "sglang_misa").iterdir() if link.is_symlink()]
    modules = [*(ROOT / "sglang_misa").rglob("*.py"), *(file for link in links for file in link.rglob("*.py"))]
    assert set(named) == {".".join(file.relative_to(ROOT).parent.parts) for file in modules}
