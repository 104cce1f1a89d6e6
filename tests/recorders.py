"""A recorder of a test's own, for what some modules tell."""

from __future__ import annotations

from types import ModuleType

import pytest

from sglang_misa.metrics import Recorder


def fresh_recorder(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> Recorder:
    """The recorder of all of `modules` until the test ends."""
    fresh = Recorder()
    for module in modules:
        monkeypatch.setattr(module, "recorder", fresh)
    return fresh
