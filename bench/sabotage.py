"""Copied as sitecustomize.py beside a server under test: flips one bit of a live page's statistics, once told to.

SOAK_SABOTAGE names a folder. When the file `now` lies there, the next step with a complete page is corrupted before the
canary looks, and `steps` counts the steps from then on. Python imports this at start-up, before anything of SGLang.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

CANARY = "sglang_misa.canary"


def corrupting(step: Any, folder: Path) -> Any:
    steps = 0

    def wrapper(self: Any, req_to_token: Any, req_ids: Any, seq_lens: Any, requests: Any) -> None:
        nonlocal steps
        from sglang_misa.kernels.layout import PAGE

        row = next((row for row in range(len(requests)) if int(seq_lens[row]) >= PAGE), None)
        if row is not None and (folder / "now").exists():
            if steps == 0:
                page = int(req_to_token[req_ids[row], 0]) // PAGE
                self.engine.stats.means[self.layers[-1]].view(dtype=_bytes())[page, 0] ^= 1
            steps += 1
            (folder / "steps").write_text(str(steps))
        step(self, req_to_token, req_ids, seq_lens, requests)

    return wrapper


def _bytes() -> Any:
    import torch

    return torch.uint8


class AfterImport(importlib.abc.MetaPathFinder):
    """Wraps the canary's step once its module has been executed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != CANARY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_wrap(module: Any) -> None:
            execute(module)
            module.Canary.step = corrupting(module.Canary.step, Path(os.environ["SOAK_SABOTAGE"]))

        spec.loader.exec_module = execute_and_wrap  # type: ignore[method-assign]
        return spec


if "SOAK_SABOTAGE" in os.environ:
    sys.meta_path.insert(0, AfterImport())
