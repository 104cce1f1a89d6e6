"""For every Python process that has this folder on PYTHONPATH: watches the indexer hooks of a server from inside.

WATCH_SELECTIONS names a folder for <pid>, a line a call: the hook, and a digest of the selected sets. WATCH_MEANS names
one for <pid> with two numbers: how many page means decode has read, and how many were not those of the stored keys.
Python imports this module by its name at start-up, before anything of SGLang.
"""

import hashlib
import importlib.util
import os
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path


class AfterImport(MetaPathFinder):
    """Wraps functions of a module once it has been executed."""

    def __init__(self, module, wrap, functions):
        self.module, self.wrap, self.functions = module, wrap, functions

    def find_spec(self, name, path=None, target=None):
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_wrap(module):
            execute(module)
            for function in self.functions:
                setattr(module, function, self.wrap(getattr(module, function)))

        spec.loader.exec_module = execute_and_wrap
        return spec


def own_file(variable):
    return Path(os.environ[variable]) / str(os.getpid())


def selections(hook):
    def wrapper(original, *args, **kwargs):
        selected = hook(original, *args, **kwargs)
        digest = hashlib.sha256(selected.sort(-1).values.cpu().numpy().tobytes()).hexdigest()
        with own_file("WATCH_SELECTIONS").open("a") as log:
            log.write(f"{hook.__name__} {digest}\n")
        return selected

    return wrapper


def means(paged_scores):
    read = wrong = 0

    def wrapper(policy, index_q, head_gates, buffer, page_table, row_lens, stats, layer):
        nonlocal read, wrong
        import torch

        from sglang_misa import reference
        from sglang_misa.kernels.layout import PAGE

        for pages, length in zip(page_table, row_lens.tolist(), strict=True):
            complete = pages[: length // PAGE].long()
            expected = reference.page_means(buffer[complete])
            same = torch.isclose(stats.means[layer][complete].float(), expected, rtol=2**-7, atol=1e-6).all(1)
            read, wrong = read + len(complete), wrong + int((~same).sum())
        own_file("WATCH_MEANS").write_text(f"{read} {wrong}")
        return paged_scores(policy, index_q, head_gates, buffer, page_table, row_lens, stats, layer)

    return wrapper


if "WATCH_SELECTIONS" in os.environ:
    sys.meta_path.insert(
        0, AfterImport("sglang_misa.patches.indexer", selections, ("get_topk_ragged", "get_topk_paged"))
    )
if "WATCH_MEANS" in os.environ:
    sys.meta_path.insert(0, AfterImport("sglang_misa.indexer", means, ("paged_scores",)))
