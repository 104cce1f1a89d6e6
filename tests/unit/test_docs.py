"""What the pages say exists: files that they link or name, modules and their flags, targets of make."""

import contextlib
import functools
import importlib.util
import io
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from sglang_misa import flags
from sglang_misa.config import PRESETS, MisaConfig

ROOT = Path(__file__).parents[2]
FOLDERS = ("docs", "bench", "kernels", "examples", ".github")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in ROOT.glob(f"{folder}/**/*.md"))])
MADE = {"docker/.env", "docker/secrets"}  # by whoever deploys
COMMANDED = {"sglang_misa.bench.load", "sglang_misa.bench.quality"}  # modules of several commands


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_headings(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#\s]*)#([^)\s]+)\)", page.read_text())
    assert [anchor for file, anchor in targets if anchor not in headings(page.parent / file if file else page)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_flags_of_ours_exist(page: Path) -> None:
    named = set(re.findall(r"--misa-[a-z-]+[a-z]", page.read_text()))
    assert named <= set(flags.flag_names())


def test_every_flag_and_preset_has_its_line() -> None:
    lines = (ROOT / "docs/configuration.md").read_text().splitlines()
    rows = {name: line for line in lines if line.startswith("|") for name in re.findall(r"`(--misa-[a-z-]+)`", line)}
    assert rows.keys() == {flag.name for flag in flags.every()} | {"--misa-policy"}
    stale = [flag.name for flag in flags.every() if f"| {flag.help} |" not in rows[flag.name].replace("\\|", "|")]
    assert stale == []
    readme = (ROOT / "README.md").read_text()
    assert [name for name in PRESETS if f"`{name}`" not in readme] == []


def test_every_flag_has_its_field_its_words_and_its_default() -> None:
    lines = (ROOT / "docs/configuration.md").read_text().splitlines()
    told = {}
    for cells in (re.split(r"(?<!\\)\|", line) for line in lines if line.startswith("| `--misa-")):
        flag_words, json_words = (re.findall(r"`([^`]+)`", cell) for cell in cells[1:3])
        told |= {name: (path, *map(str.strip, cells[3:5])) for name, path in zip(flag_words, json_words, strict=True)}
    switch = {True: "on", False: "off"}
    for flag in flags.every():
        default: Any = functools.reduce(lambda model, name: getattr(model, name), flag.path, MisaConfig())
        if default is None:
            default = flag.none_word or "no dump"
        elif not isinstance(default, str):
            default = switch[default] if isinstance(default, bool) else f"{default:g}"
        path, words, said = told[flag.name]
        assert (path, said) == (".".join(flag.path), default)
        assert flag.choices is None or tuple(re.findall(r"`(\w+)`", words)) == flag.choices


def test_the_first_screen_has_the_figures_of_the_measured_table() -> None:
    lines = [line.strip("| ").split(" | ") for line in (ROOT / "README.md").read_text().splitlines()]
    timed = [line for line in reversed(lines) if line[0] in ("prefill", "decode")]  # of several tables the first counts
    measured = {tuple(line[:3]): [float(n) for n in line[3:5]] for line in timed}
    for what, kind in (("8192 rows of prefill", ("prefill", "8192")), ("a decode step of 64", ("decode", "64"))):
        (told,) = [[float(cell.split()[0]) for cell in line[1:]] for line in lines if what in line[0]]
        (stock, fast), (_, faithful) = (measured[*kind, preset] for preset in ("fast", "faithful"))
        assert told == [stock, fast, faithful]


def test_every_preset_has_the_names_of_its_policies() -> None:
    text = (ROOT / "docs/configuration.md").read_text()
    lines = [
        f"| `{name}` | `{preset.name('prefill')}` | `{preset.name('decode')}` |" for name, preset in PRESETS.items()
    ]
    assert [line for line in lines if line not in text] == []


def test_make_has_the_targets_that_pages_name() -> None:
    targets = set(re.findall(r"^([a-z0-9.-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {target for page in PAGES for target in re.findall(r"`make ([a-z][a-z0-9.-]+)`", page.read_text())}
    assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page: Path) -> None:
    top = "bench|docker|docs|examples|kernels|patches|sglang_misa|tests"
    named = set(re.findall(rf"`((?:{top})/[\w./-]*\w/?)`", page.read_text())) - MADE
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_architecture_has_a_line_for_every_module() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    modules = {path.name for path in (ROOT / "sglang_misa").glob("*.py")} - {"__init__.py"}
    assert {name for name in modules if name not in text} == set()


def test_metrics_that_operations_names_exist() -> None:
    metrics = (ROOT / "sglang_misa/metrics.py").read_text()
    exported = set(re.findall(r'(?:gauge|count)\(\s*"(\w+)"|"sglang_misa:(\w+)"', metrics))
    known = {name for pair in exported for name in pair}
    named = re.findall(r"sglang_misa:(\w+)", (ROOT / "docs/operations.md").read_text())
    assert {name for name in named if name.removesuffix("_total") not in known} == set()


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """(module, words) of each `python -m sglang_misa…` in a page's blocks of code."""
    code = "\n".join(line[4:] for line in page.read_text().splitlines() if line.startswith("    "))
    lines = [line for line in code.replace("\\\n", " ").splitlines() if "python -m sglang_misa" in line]
    for words in (shlex.split(line, comments=True) for line in lines):
        quoted = [shlex.split(word) for word in words if "python -m sglang_misa" in word]
        for command in [words, *quoted]:
            at = command.index("-m")
            yield command[at + 1], command[at + 2 :]


@functools.cache
def usage(module: str, subcommand: str | None) -> str:
    out = io.StringIO()
    words = [module, *([subcommand] if subcommand else []), "--help"]
    with mock.patch.object(sys, "argv", words), contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        runpy.run_module(module, run_name="__main__")
    return out.getvalue()


@functools.cache
def sglang_flags() -> frozenset[str]:
    import argparse

    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return frozenset(name for action in parser._actions for name in action.option_strings)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if [*commands(page)]], ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_name_modules_and_flags_that_exist(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    for module, words in commands(page):
        assert importlib.util.find_spec(module) is not None, module
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        text = usage(module, words[0] if module in COMMANDED else None)
        unknown = given - set(re.findall(r"--[a-z][a-z-]*", text))
        if module in ("sglang_misa.launch_server", "sglang_misa.bench.one_rank"):  # SGLang takes what begins alike
            unknown = {flag for flag in unknown if not any(name.startswith(flag) for name in sglang_flags())}
        assert not unknown, module
