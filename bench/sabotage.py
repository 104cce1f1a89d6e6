"""Copied as sitecustomize.py beside a server under test: flips a bit of a live page's statistics, fills its disk, and
weighs its GPU memory.

SOAK_SABOTAGE names a folder. When the file `steps` lies there, the next step that decodes a request with a complete
page is corrupted before the canary looks; the file then counts the steps, and says if the statistic was mended since.
Each process tells there, after each step, the bytes of its tensors on GPUs. After SOAK_DISK_FILES files the disk of
SGLang's host cache has no space left. Python imports this at start-up, before anything of SGLang.
"""

from __future__ import annotations

import errno
import importlib.abc
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

CANARY, STORAGE = "sglang_misa.canary", "sglang.srt.mem_cache.hicache_storage"
FOLDER, DISK_FILES = "SOAK_SABOTAGE", "SOAK_DISK_FILES"
STEPS, GPU_MEMORY = "steps", "gpu_memory."  # files in the folder; the last one with a process id behind it


def corrupting(step: Any, folder: Path) -> Any:
    steps, before = 0, dict[str, int]()
    statistic = left = None  # a page's mean, and what it was left as

    def wrapper(self: Any, req_to_token: Any, req_ids: Any, seq_lens: Any, requests: Any) -> None:
        nonlocal steps, before, statistic, left
        import torch

        from sglang_misa.kernels.layout import PAGE

        if (folder / STEPS).exists():
            lengths = dict(zip(requests, seq_lens.tolist(), strict=False))
            # by a token: the next chunk of a prompt would compute the statistics of its whole prefix anew
            decoded = (row for row, (name, length) in enumerate(lengths.items()) if before.get(name) == length - 1)
            row = next((row for row in decoded if int(seq_lens[row]) >= PAGE), None)
            before = lengths
            if statistic is None and row is not None:
                page = int(req_to_token[req_ids[row], 0]) // PAGE
                statistic = self.engine.stats.means[self.layers[-1]].view(torch.uint8)[page]
                statistic[0] ^= 1
                left = statistic.clone()
            if statistic is not None:
                steps += 1
                (folder / STEPS).write_text(f"{steps}" if torch.equal(statistic, left) else f"{steps} and mended")
        step(self, req_to_token, req_ids, seq_lens, requests)
        if req_to_token.is_cuda:
            weigh(folder, torch.cuda.memory_allocated(req_to_token.device))

    return wrapper


def weigh(folder: Path, used: int) -> None:
    """Tell a size, so that whoever reads it finds it whole."""
    told = folder / f"{os.getpid()}.tmp"
    told.write_text(str(used))
    told.replace(folder / f"{GPU_MEMORY}{os.getpid()}")


class NoSpace:
    """A page that a full disk does not take."""

    def __init__(self, page: Any):
        self.numel, self.element_size = page.numel, page.element_size

    def contiguous(self) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def filling(save: Any, files: int) -> Any:
    saved = 0

    def wrapper(self: Any, key: str, value: Any = None, *args: Any, **kwargs: Any) -> Any:
        nonlocal saved
        saved += 1
        return save(self, key, value if saved <= files else NoSpace(value), *args, **kwargs)

    return wrapper


def sabotage(module: Any) -> None:
    if module.__name__ == CANARY:
        module.Canary.step = corrupting(module.Canary.step, Path(os.environ[FOLDER]))
    else:
        module.HiCacheFile.set = filling(module.HiCacheFile.set, int(os.environ[DISK_FILES]))


class AfterImport(importlib.abc.MetaPathFinder):
    """Sabotages a module once it has been executed."""

    def __init__(self) -> None:
        self.left = {CANARY, STORAGE}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in self.left:
            return None
        self.left.remove(name)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_sabotage(module: Any) -> None:
            execute(module)
            sabotage(module)

        spec.loader.exec_module = execute_and_sabotage  # type: ignore[method-assign]
        return spec


if FOLDER in os.environ:
    sys.meta_path.insert(0, AfterImport())
