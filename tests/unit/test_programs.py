"""Every `python -m sglang_misa.…`: how it answers a word that it does not know."""

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORWARDS = {"sglang_misa.bench.soak"}  # whose unknown words are the launcher's: SGLang judges them


def programs() -> list[str]:
    """The modules that run as programs."""
    found = set()
    for folder, package in ((ROOT / "sglang_misa", "sglang_misa"), (ROOT / "bench", "sglang_misa.bench")):
        for file in folder.glob("**/*.py"):
            if 'if __name__ == "__main__":' in file.read_text(encoding="utf-8"):
                parts = file.relative_to(folder).with_suffix("").parts
                found.add(".".join([package, *(part for part in parts if part != "__main__")]))
    return sorted(found - FORWARDS)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("module", programs())
def test_an_unknown_word_ends_with_exit_status_2_and_a_sentence(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, "--no-such-flag"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert ended.value.code == 2
    assert capsys.readouterr().err.strip()
