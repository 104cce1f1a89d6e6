"""For every Python process that has this folder on PYTHONPATH: logs what each indexer hook selects.

A line a call in $SELECTIONS_LOG/<pid>: the hook, and a digest of the selected sets. Python imports this module by its
name at start-up, before anything of SGLang.
"""

import hashlib
import importlib.util
import os
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

HOOKS = "sglang_misa.patches.indexer"


class AfterImport(MetaPathFinder):
    """Wraps the hooks once their module has been executed."""

    def find_spec(self, name, path=None, target=None):
        if name != HOOKS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_wrap(module):
            execute(module)
            for hook in ("get_topk_ragged", "get_topk_paged"):
                setattr(module, hook, logged(getattr(module, hook)))

        spec.loader.exec_module = execute_and_wrap
        return spec


def logged(hook):
    def wrapper(original, *args, **kwargs):
        selected = hook(original, *args, **kwargs)
        digest = hashlib.sha256(selected.sort(-1).values.cpu().numpy().tobytes()).hexdigest()
        with (Path(os.environ["SELECTIONS_LOG"]) / str(os.getpid())).open("a") as log:
            log.write(f"{hook.__name__} {digest}\n")
        return selected

    return wrapper


sys.meta_path.insert(0, AfterImport())
