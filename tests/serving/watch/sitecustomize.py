"""For every Python process of a server in these tests: quicker imports, and the indexer hooks watched from inside.

WATCH_SELECTIONS names a folder for <pid>, a line a call: the hook, and a digest of the selected sets.
WATCH_POOL names one for <layer>-<rows>.pt: the index-K pages of an extend call's first request, its queries and gates.
SABOTAGE names a file: while it is there, the worst heads are routed and the worst blocks are kept.
UNDONE_RANK is a rank whose hook of the indexer is undone once SGLang has built the model.
PARTED_RANK is a rank that selects one token of each prompt row twice, while the file that PARTED names is there.
Python imports this module by its name at start-up, before anything of SGLang.
"""

import functools
import gc
import hashlib
import importlib.util
import os
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path


class AfterImport(MetaPathFinder):
    """Wraps functions and methods of a module once it has been executed."""

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
            for path in self.functions:
                *owners, name = path.split(".")
                owner = functools.reduce(getattr, owners, module)
                setattr(owner, name, self.wrap(getattr(owner, name)))

        spec.loader.exec_module = execute_and_wrap
        return spec


def own_file(variable):
    return Path(os.environ[variable]) / str(os.getpid())


def is_rank(variable):
    from torch import distributed

    rank = distributed.get_rank() if distributed.is_initialized() else 0
    return rank == int(os.environ[variable])


def selections(hook):
    def wrapper(original, *args, **kwargs):
        selected = hook(original, *args, **kwargs)
        digest = hashlib.sha256(selected.sort(-1).values.cpu().numpy().tobytes()).hexdigest()
        with own_file("WATCH_SELECTIONS").open("a") as log:
            log.write(f"{hook.__name__} {digest}\n")
        return selected

    return wrapper


def pool(hook):
    def wrapper(original, self, dual, forward_batch, layer_id, q_fp8, weights, metadata, *rest):
        import torch
        from sglang.srt.layers.attention.dsa import dsa_indexer

        selected = hook(original, self, dual, forward_batch, layer_id, q_fp8, weights, metadata, *rest)
        length = int(metadata.get_indexer_seq_len_cpu()[0])
        pages = metadata.get_page_table_64()[0, : -(-length // 64)].long()
        held = dsa_indexer.get_token_to_kv_pool().index_k_with_scale_buffer[layer_id][pages].clone()
        name = Path(os.environ["WATCH_POOL"]) / f"{layer_id}-{len(q_fp8)}.pt"
        torch.save({"pages": held, "q": q_fp8.clone(), "gates": weights.clone()}, name)
        return selected

    return wrapper


def worst(best):
    def wrapper(statistic, *arguments):
        return best(-statistic if os.path.exists(os.environ["SABOTAGE"]) else statistic, *arguments)

    return wrapper


def undone(evaluate):
    def wrapper(module):
        indexer = sys.modules.get("sglang.srt.layers.attention.dsa.dsa_indexer")
        if indexer is not None and is_rank("UNDONE_RANK"):
            hook = indexer.Indexer._get_topk_ragged
            indexer.Indexer._get_topk_ragged = getattr(hook, "__wrapped__", hook)
        return evaluate(module)

    return wrapper


def parted(extend):
    def wrapper(self, call, runs):
        extend(self, call, runs)
        if os.path.exists(os.environ["PARTED"]) and is_rank("PARTED_RANK"):
            call.output.ids[:, 1] = call.output.ids[:, 0]

    return wrapper


def collecting(function):
    gc.enable()
    return function


# A quarter of the time that SGLang's imports take goes into looking for garbage; on again once they are done.
gc.disable()
sys.meta_path.insert(0, AfterImport("sglang.srt.managers.scheduler", collecting, ("run_scheduler_process",)))
if "WATCH_POOL" in os.environ:
    sys.meta_path.insert(0, AfterImport("sglang_misa.patches.indexer", pool, ("get_topk_ragged",)))
if "SABOTAGE" in os.environ:
    sys.meta_path.insert(0, AfterImport("sglang_misa.reference", worst, ("top_heads", "best_blocks")))
if "WATCH_SELECTIONS" in os.environ:
    sys.meta_path.insert(
        0, AfterImport("sglang_misa.patches.indexer", selections, ("get_topk_ragged", "get_topk_paged"))
    )
if "UNDONE_RANK" in os.environ:
    sys.meta_path.insert(0, AfterImport("torch.nn.modules.module", undone, ("Module.eval",)))
if "PARTED_RANK" in os.environ:
    for engine in ("kernels.KernelEngine", "reference.ReferenceEngine"):
        module, name = engine.split(".")
        sys.meta_path.insert(0, AfterImport(f"sglang_misa.engines.{module}", parted, (f"{name}.extend",)))
