"""Every function of SGLang that this package wraps, as data, and the few lines that apply, check and undo them.

A wrapper is called as wrapper(original, *args, **kwargs) and decides itself whether to call the original. Nothing is
hooked that SGLang reaches only in ways admission refuses: DSATokenToKVPool.move_kv_cache (tree drafts) rewrites
index-K too.

A target is named by its place in the newest supported version; `moved` has its earlier places.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sglang_misa import admission, versions
from sglang_misa.admission import AdmissionError


@dataclass(frozen=True)
class Patch:
    """One wrapped function of SGLang."""

    target: str  # "module:Class.function"
    wrapper: str  # "module:function", looked up when the patch is applied
    why: str
    how: str
    upstream: str  # the related pull request, or why there is none
    remove_when: str
    signatures: Mapping[str, str]  # `fingerprint` of the target, by the first version that has it
    moved: Mapping[str, str] = field(default_factory=dict)  # its places, by the first version that has it there

    def signature(self, version: str) -> str:
        """The target's fingerprint in a supported SGLang `version`."""
        return _as_of(self.signatures, version)

    def place(self, version: str) -> str:
        """Where a supported SGLang `version` has the target."""
        return _as_of(self.moved, version) if self.moved else self.target


def _as_of(first: Mapping[str, str], version: str) -> str:
    """The value for a supported `version` of those that `first` holds by the first version each is true for."""
    known = versions.SUPPORTED[: versions.SUPPORTED.index(version) + 1]
    return [first[since] for since in known if since in first][-1]


_NO_EXTENSION_POINT = "none: SGLang has no extension point for choosing an indexer"
_UNTIL_EXTENSION_POINT = "SGLang lets a plugin register a DSA indexer"

_GRAPHS = "sglang.srt.model_executor.runner_backend.full_cuda_graph_backend"
_NO_GRAPH_VARIANTS = "none: SGLang's graph variants are its own (LoRA), and a plugin cannot add one"
_UNTIL_GRAPH_VARIANTS = "a plugin can add a variant of a decode graph and choose it at replay"

_POOL = (
    "self, size, page_size, kv_lora_rank, dtype, qk_rope_head_dim, layer_num, device, index_head_dim, "
    "enable_memory_saver, kv_cache_dim, start_layer=, end_layer=, index_buf_size="
)
_POOL_SINCE_22 = (
    "index_kpool=, index_kpool_compress=, tail_extra_slots=, max_running_requests=, skip_topk_layers=, dcp_replicated="
)
_BATCH = "cls, batch, model_runner, *, capture_hidden_mode=, return_hidden_states_before_norm"
_BATCH_SINCE_22 = "extend_position_info=, spec_mrope_positions=, kv_loc_plan=, write_cols="

_LOAD = "DSAIndexerPoolHost.load_to_device_per_layer"

LOAD_MODEL = Patch(
    target="sglang.srt.model_executor.model_runner:ModelRunner.load_model",
    wrapper="sglang_misa.patches.model_runner:load_model",
    why="SGLang's plugin loader logs and drops every exception, so a broken plugin would serve stock DSA in silence",
    how="around: admission and the patches below before the weights, the loaded Indexer modules after; may raise",
    upstream="none: the loader is meant to survive its plugins",
    remove_when="the plugin loader can be told that a plugin is mandatory",
    signatures={"0.5.17": "self"},
)

PATCHES = (
    Patch(
        target="sglang.srt.layers.attention.dsa.dsa_indexer:Indexer._get_topk_paged",
        wrapper="sglang_misa.patches.indexer:get_topk_paged",
        why="decode, target-verify and draft-extend rows are scored and selected here",
        how="around: selects by the decode policy, and writes what metadata.topk_transform would",
        upstream=_NO_EXTENSION_POINT,
        remove_when=_UNTIL_EXTENSION_POINT,
        signatures={"0.5.17": "self, forward_batch, layer_id, q_fp8, weights, metadata"},
    ),
    Patch(
        target="sglang.srt.layers.attention.dsa.dsa_indexer:Indexer._get_topk_ragged",
        wrapper="sglang_misa.patches.indexer:get_topk_ragged",
        why="the rows of an extend call are scored and selected here",
        how="around: selects by the prefill policy past the length gate, and writes what metadata.topk_transform would",
        upstream=_NO_EXTENSION_POINT,
        remove_when=_UNTIL_EXTENSION_POINT,
        signatures={
            "0.5.17": "self, enable_dual_stream, forward_batch, layer_id, q_fp8, weights, metadata, topk_result="
        },
    ),
    Patch(
        target="sglang.srt.layers.attention.dsa.dsa_indexer:Indexer._forward_cuda_k_only",
        wrapper="sglang_misa.patches.indexer:forward_k_only",
        why="prefills up to index_topk write index-K and select nothing, but decode needs statistics of their pages",
        how="after: the statistics of the pages just completed",
        upstream=_NO_EXTENSION_POINT,
        remove_when=_UNTIL_EXTENSION_POINT,
        signatures={
            "0.5.17": "self, x, positions, forward_batch, layer_id, act_quant, metadata, return_indices=, *, "
            "num_tokens=, topk_result="
        },
    ),
    Patch(
        target="sglang.srt.mem_cache.memory_pool:DSATokenToKVPool.__init__",
        wrapper="sglang_misa.patches.pool:init",
        why="page statistics live as long as the index-K pages they describe, and a draft model has a pool of its own",
        how="after: pool.misa_selector, with an engine that keeps the statistics of its index-K pages",
        upstream="none: the JIT store kernels fix the byte width of a page, so statistics cannot ride in it",
        remove_when="an index-K page may carry plugin bytes",
        signatures={"0.5.17": _POOL, "0.5.22": f"{_POOL}, {_POOL_SINCE_22}"},
    ),
    Patch(
        target=f"sglang.srt.mem_cache.pool_host.dsa:{_LOAD}",
        moved={
            "0.5.17": f"sglang.srt.mem_cache.memory_pool_host:{_LOAD}",
            "0.5.22": f"sglang.srt.mem_cache.pool_host.dsa:{_LOAD}",
        },
        wrapper="sglang_misa.patches.pool:load_to_device_per_layer",
        why="a host cache restores index-K pages at other places than they were saved from, without statistics",
        how="after: the statistics of the restored pages, on the stream of the load, before the layer's event",
        upstream="none: a host cache carries SGLang's own buffers",
        remove_when="a pool may declare buffers that follow its pages to the host and back",
        signatures={
            "0.5.17": "self, device_pool, host_indices, device_indices, layer_id, io_backend",
            "0.5.22": "self, device_pool, host_indices, device_indices, layer_id, io_backend, *, is_draft=",
        },
    ),
    Patch(
        target="sglang.srt.disaggregation.decode:DecodeTransferQueue.pop_transferred",
        wrapper="sglang_misa.patches.disaggregation:pop_transferred",
        why="a prefill server writes index-K pages into this server's pool, without statistics",
        how="after: the statistics of the pages of the requests that have come, before they enter a batch",
        upstream="none: a transfer carries SGLang's own buffers",
        remove_when="a pool may declare buffers that are transferred with its pages",
        signatures={"0.5.17": "self, rids_to_check="},
    ),
    Patch(
        target="sglang.srt.mem_cache.memory_pool:DSATokenToKVPool.load_cpu_copy",
        wrapper="sglang_misa.patches.disaggregation:load_cpu_copy",
        why="the decode side of disaggregation keeps a retracted request's pages on the host, without statistics",
        how="after: the statistics of the pages that are back",
        upstream="none: the copy has SGLang's own buffers",
        remove_when="a pool may declare buffers that follow its pages to the host and back",
        signatures={
            "0.5.17": "self, kv_cache_cpu_dict, indices, mamba_indices=",
            "0.5.22": "self, kv_cache_cpu_dict, indices, mamba_indices=, req_pool_index=",
        },
    ),
    Patch(
        target="sglang.srt.model_executor.pool_configurator:DefaultPoolConfigurator._compute_cell_size",
        wrapper="sglang_misa.patches.pool:compute_cell_size",
        why="page statistics must be paid for by the KV budget, or a full server runs out of memory",
        how="after: adds the bytes of statistics, per token and layer",
        upstream="none: follows from the patch of DSATokenToKVPool",
        remove_when="the patch of DSATokenToKVPool is removed",
        signatures={"0.5.17": "self, kvc, num_layers"},
    ),
    Patch(
        target="sglang.srt.model_executor.model_runner:ModelRunner.forward",
        wrapper="sglang_misa.patches.model_runner:forward",
        why="page statistics that are stale make answers worse and nothing else, and graphs run no Python inside",
        how="after: the canary (--misa-verify-stats) and the ranks (--misa-verify-ranks) look at what the step did",
        upstream="none: SGLang's own KV canary knows SGLang's buffers alone",
        remove_when="an index-K page may carry plugin bytes",
        signatures={
            "0.5.17": "self, forward_batch, skip_attn_backend_init=, pp_proxy_tensors=, reinit_attn_backend=, "
            "split_forward_count="
        },
    ),
    Patch(
        target="sglang.srt.model_executor.model_runner:ModelRunner.init_cuda_graphs",
        wrapper="sglang_misa.patches.model_runner:init_cuda_graphs",
        why="the last step before serving, on CPU too: another plugin may have unseated a hook since load_model",
        how="before: every hook is live, pool and attention are SGLang's, and all ranks are armed alike; may raise",
        upstream="none: SGLang has no start-up check for plugins",
        remove_when="the patch of ModelRunner.load_model is removed",
        signatures={"0.5.17": "self, capture_decode_cuda_graph="},
    ),
    Patch(
        target="sglang.srt.model_executor.forward_batch_info:ForwardBatch.init_new",
        wrapper="sglang_misa.patches.forward_batch:init_new",
        why="speculative decoding under the overlap scheduler keeps no lengths on the host, and the gate needs them",
        how="around: ladders meet; after: misa_step, the lengths of its requests, and which prompts end in the batch",
        upstream=_NO_GRAPH_VARIANTS,
        remove_when="a batch always has a bound of its lengths on the host",
        signatures={"0.5.17": _BATCH, "0.5.22": f"{_BATCH}, {_BATCH_SINCE_22}"},
    ),
    Patch(
        target=f"{_GRAPHS}:FullCudaGraphBackend.capture_one",
        wrapper="sglang_misa.patches.cuda_graph:capture_one",
        why="a CUDA graph cannot choose a selection by length, and below a length stock DSA is the faster one",
        how="around: captures decode shapes by the policy, and once more with stock DSA under a key of its own",
        upstream=_NO_GRAPH_VARIANTS,
        remove_when=_UNTIL_GRAPH_VARIANTS,
        signatures={"0.5.17": "self, shape_key, forward_fn, capture_inputs=, post_warmup_hook="},
    ),
    Patch(
        target=f"{_GRAPHS}:FullCudaGraphBackend.replay",
        wrapper="sglang_misa.patches.cuda_graph:replay",
        why="the host knows the lengths of a step, and with them which of the two graphs is right",
        how="before: replaces the key by that of the stock variant under the gate",
        upstream=_NO_GRAPH_VARIANTS,
        remove_when=_UNTIL_GRAPH_VARIANTS,
        signatures={"0.5.17": "self, shape_key, static_forward_batch, **kwargs"},
    ),
    Patch(
        target="sglang.srt.managers.scheduler:Scheduler.get_internal_state",
        wrapper="sglang_misa.patches.scheduler:get_internal_state",
        why="/server_info must say whether and how tokens are selected",
        how="after: internal_state['misa'] = this rank's status",
        upstream="none: SGLang has no extension point for /server_info",
        remove_when="plugins can add to /server_info",
        signatures={"0.5.17": "self, recv_req"},
    ),
)

TARGETS = tuple(patch.target for patch in PATCHES)

_WAY_OUT = "name only the plugins you need in SGLANG_PLUGINS (misa among them)"


@dataclass(frozen=True)
class _Applied:
    owner: type
    name: str
    original: Any  # as it lay in the class: a function, classmethod or staticmethod
    installed: Any


_applied: dict[str, _Applied] = {}


def fingerprint(function: Callable[..., Any]) -> str:
    """Parameter names, kinds and which have a default, without annotations and values: `self, x, y=, *, z=`."""
    words: list[str] = []
    parameters = list(inspect.signature(function).parameters.values())
    for i, p in enumerate(parameters):
        if p.kind is p.KEYWORD_ONLY and not any(q.kind in (q.VAR_POSITIONAL, q.KEYWORD_ONLY) for q in parameters[:i]):
            words.append("*")
        stars = "*" if p.kind is p.VAR_POSITIONAL else "**" if p.kind is p.VAR_KEYWORD else ""
        words.append(stars + p.name + ("" if p.default is p.empty else "="))
        if p.kind is p.POSITIONAL_ONLY and not any(q.kind is q.POSITIONAL_ONLY for q in parameters[i + 1 :]):
            words.append("/")
    return ", ".join(words)


def apply(version: str, patches: Sequence[Patch] = PATCHES) -> None:
    """Wrap the targets of `patches` in SGLang `version`, all or none. Patches already applied are left as they are.

    Raises AdmissionError with every reason against: version unknown, target missing, signature changed, target already
    wrapped by somebody else.
    """
    admission.check_version(version)
    todo = [patch for patch in patches if patch.target not in _applied]
    AdmissionError.raise_if(problem for patch in todo for problem in _obstacles(patch, version))
    wrappers = [pkgutil.resolve_name(patch.wrapper) for patch in todo]
    for patch, wrapper in zip(todo, wrappers, strict=True):
        owner, name = _locate(patch.place(version))
        original = vars(owner)[name]
        wrapped = _wrap(wrapper, original)
        _applied[patch.target] = _Applied(owner, name, original, wrapped)
        setattr(owner, name, wrapped)


def undo() -> None:
    """Put every original back. Raises AdmissionError for targets wrapped by others since, which stay as they are."""
    covered = problems(_applied)
    for target, applied in list(_applied.items()):
        if vars(applied.owner).get(applied.name) is applied.installed:
            setattr(applied.owner, applied.name, applied.original)
            del _applied[target]
    AdmissionError.raise_if(covered)


def problems(targets: Iterable[str] = TARGETS) -> list[str]:
    """One sentence for each of `targets` where our wrapper is not the function that SGLang will call."""
    return [problem for target in targets if (problem := _not_live(target)) is not None]


def _not_live(target: str) -> str | None:
    applied = _applied.get(target)
    if applied is None:
        return f"{target}: expected our hook, got none; start the server with this package installed in every process"
    found = vars(applied.owner).get(applied.name)
    if found is applied.installed:
        return None
    return f"{target}: expected our hook outermost, got {_describe(target, found)}; {_WAY_OUT}"


def _obstacles(patch: Patch, version: str) -> Iterator[str]:
    place = patch.place(version)
    try:
        owner, name = _locate(place)
        found = vars(owner)[name]
    except (ImportError, AttributeError, KeyError) as error:
        yield f"{place}: expected this function in SGLang {version}, got {error!r}; reinstall sglang=={version}"
        return
    function = _function(found)
    home = f"{function.__module__}:{function.__qualname__}"
    if home != place or hasattr(function, "__wrapped__"):
        yield f"{place}: expected SGLang's own function, got {_describe(place, found)}; {_WAY_OUT}"
        return
    expected, got = patch.signature(version), fingerprint(function)
    if got != expected:
        yield f"{place}: expected the signature ({expected}), got ({got}); reinstall sglang=={version}"


def _locate(target: str) -> tuple[type, str]:
    module, path = target.split(":")
    owner_path, name = path.rsplit(".", 1)
    owner: Any = functools.reduce(getattr, owner_path.split("."), importlib.import_module(module))
    return owner, name


def _function(raw: Any) -> Callable[..., Any]:
    return raw.__func__ if isinstance(raw, classmethod | staticmethod) else raw


def _wrap(wrapper: Callable[..., Any], raw: Any) -> Any:
    original = _function(raw)

    @functools.wraps(original)
    def hooked(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    return type(raw)(hooked) if isinstance(raw, classmethod | staticmethod) else hooked


def _describe(target: str, raw: Any) -> str:
    """Who put `raw` in the place of `target`: the plugins that asked SGLang's registry for it, or a file."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    hooks = HookRegistry._hooks.get(target.replace(":", "."), ())
    if hooks:
        names = sorted({source.plugin_name if source else "unknown" for _, _, source in hooks})
        return f"a hook of plugin {', '.join(names)}"
    code = getattr(_function(raw), "__code__", None)
    return f"a function from {code.co_filename}:{code.co_firstlineno}" if code else repr(raw)
