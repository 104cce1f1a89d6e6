"""What the pages say exists: files that they link, flags, targets of make."""

import re
from pathlib import Path

import pytest

from sglang_misa import flags
from sglang_misa.config import PRESETS

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/**/*.md"), ROOT / "kernels/README.md"])
# Flags of the launcher and of SGLang that begin alike, but are no field of the configuration.
OTHERS = {"--misa-preset", "--misa-config"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_flags_of_ours_exist(page: Path) -> None:
    named = set(re.findall(r"--misa-[a-z-]+[a-z]", page.read_text()))
    assert named <= set(flags.flag_names()) | OTHERS


def test_every_flag_and_preset_has_its_line() -> None:
    text = (ROOT / "docs/configuration.md").read_text()
    assert {name for name in flags.flag_names() if f"| `{name}` |" not in text} == OTHERS
    readme = (ROOT / "README.md").read_text()
    assert [name for name in PRESETS if f"`{name}`" not in readme] == []


def test_make_has_the_targets_that_pages_name() -> None:
    targets = set(re.findall(r"^([a-z0-9.-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {target for page in PAGES for target in re.findall(r"`make ([a-z][a-z0-9.-]+)`", page.read_text())}
    assert named <= targets
