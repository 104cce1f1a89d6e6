"""What the CPU platform replaces in SGLang, as data, and the installer that refuses to go on when one did not take.

`Indexer._get_topk_paged` and `Indexer._get_topk_ragged` are never touched: token selection patches wrap those.
"""

from __future__ import annotations

import multiprocessing
import pkgutil
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_misa import versions
from sglang_misa.cpu import capture, deep_gemm, host_cache, kernels

MQA_LOGITS_BUDGET = 1 << 29  # bytes of fp32 scores that Indexer holds before it chunks over query rows


class _CpuHooks(HookRegistry):  # type: ignore[misc]
    """SGLang's hook registry with lists of its own: applying ours leaves another plugin's targets alone."""

    _hooks: ClassVar[dict[str, Any]] = defaultdict(list)
    _patched: ClassVar[set[str]] = set()


def _launchable(function: Callable[..., None]) -> type:
    """A stand-in for a Triton kernel: kernel[grid](*args) calls `function`. (The registry replaces only with a class
    what is no function itself.)"""
    return type(function.__name__, (), {"__class_getitem__": classmethod(lambda _cls, _grid: function)})


def _device_capability(device: Any = None) -> tuple[int, int]:
    return (0, 0)  # below every architecture SGLang tests for


def _last_loc(*args: Any) -> Any:
    from sglang.srt.mem_cache.allocation import get_last_loc_torch

    return get_last_loc_torch(*args)


def _resolve(target: str) -> Any:
    try:
        return pkgutil.resolve_name(target)
    except (AttributeError, ImportError):
        return None


def _first(*targets: str) -> str:
    """The first of `targets` that the installed SGLang has; the last where it has none, to be named in the refusal."""
    return next((target for target in targets if _resolve(target) is not None), targets[-1])


_OPS = "sglang.kernels.ops"
_POOL = "sglang.srt.mem_cache.memory_pool.DSATokenToKVPool"
_DSA = "sglang.srt.layers.attention.dsa.dsa_indexer"

ARGUMENT_HOOKS: Mapping[str, Callable[..., Any] | type] = {"torch.cuda.get_device_capability": _device_capability}

MODEL_HOOKS: Mapping[str, Callable[..., Any] | type] = {
    # Scheduler and allocator: from 0.5.22 on the platform's capabilities say the same
    "sglang.srt.utils.common.support_triton": lambda backend: False,
    f"{_OPS}.memory.common.get_last_loc_triton": _last_loc,
    f"{_OPS}.memory.allocator.alloc_extend_kernel": _launchable(kernels.alloc_extend),
    f"{_OPS}.memory.allocator.alloc_decode_kernel": _launchable(kernels.alloc_decode),
    # Pools
    f"{_OPS}.kvcache.mla_buffer.set_mla_kv_buffer_triton": kernels.store_latent_kv,
    f"{_POOL}.set_index_k_scale_buffer": kernels.set_index_keys,
    f"{_POOL}.get_index_k_scale_buffer": kernels.get_index_keys,
    # Indexer
    _first(
        f"{_OPS}.quantization.act_quant_triton.act_quant",
        f"{_OPS}.attention.dsa.triton_kernel.act_quant",  # until 0.5.22
    ): kernels.act_quant,
    f"{_DSA}.can_use_dsa_fused_store": lambda *shape: False,
    f"{_OPS}.quantization.hadamard.hadamard_transform": kernels.hadamard_transform,
    f"{_DSA}.Indexer._weights_proj_bf16_in_fp32_out": kernels.project_head_gates,
    # Sparse attention
    f"{_OPS}.attention.dsa.transform_index.transform_index_page_table_prefill": kernels.page_table_rows_prefill,
    f"{_OPS}.attention.dsa.transform_index.transform_index_page_table_decode": kernels.page_table_rows_decode,
    "sglang.srt.layers.attention.dsa_backend.DeepseekSparseAttnBackend._forward_tilelang": kernels.sparse_attention,
    # --enable-return-indexer-topk
    "sglang.srt.state_capturer.indexer_topk.create_indexer_capturer": capture.create_indexer_capturer,
    "sglang.srt.state_capturer.base.BaseHostCache.__init__": capture.init_host_cache,
}


def install_for_arguments() -> None:
    """What `ServerArgs` needs, in the main process. Raises RuntimeError when a hook did not apply."""
    _install(ARGUMENT_HOOKS)


def install_for_models() -> None:
    """What a worker needs before it builds the model. Raises RuntimeError when a hook did not apply."""
    from sglang.srt.distributed import parallel_state
    from sglang.srt.layers import dp_attention
    from sglang.srt.layers.attention import dsa_backend
    from sglang.srt.layers.attention.dsa import dsa_indexer
    from sglang.srt.layers.rotary_embedding.rope_variant import DeepseekScalingRotaryEmbedding
    from sglang.srt.model_executor import forward_batch_info

    _install({**ARGUMENT_HOOKS, **MODEL_HOOKS})
    host_cache.install()
    if hasattr(dp_attention, "memcpy_cpu"):  # before 0.5.22 data-parallel attention pins memory on any device
        dp_attention.memcpy_func = dp_attention.memcpy_cpu
        forward_batch_info._is_cpu = parallel_state._is_cpu = True
        backend = dsa_backend.DeepseekSparseAttnBackend
        backend.get_cpu_graph_seq_len_fill_value = backend.get_cuda_graph_seq_len_fill_value
    if multiprocessing.parent_process() is not None:
        # Never in the main process: this imports prometheus_client, which must first be told where to keep its metrics.
        from sglang.srt.disaggregation.mooncake.conn import MooncakeKVSender

        MooncakeKVSender.supports_host_tensor_indices = False  # or page numbers are sent from pinned memory
    # Indexer.forward_cuda is the only full path; these are what it reads from its module and its class.
    dsa_indexer._is_cuda = True
    dsa_indexer.deep_gemm = sys.modules["deep_gemm"] = deep_gemm  # from 0.5.22 on it is imported at each call
    dsa_indexer.Indexer._mqa_logits_budget_bytes[0] = MQA_LOGITS_BUDGET
    # The base class that owns this classmethod has another name and place in each version.
    dsa_indexer.Indexer.register_oot_forward(dsa_indexer.Indexer, dsa_indexer.Indexer.forward_cuda, "cpu")
    DeepseekScalingRotaryEmbedding.register_oot_forward(DeepseekScalingRotaryEmbedding, kernels.yarn_rope, "cpu")


def _install(hooks: Mapping[str, Callable[..., Any] | type]) -> None:
    """Replace every target once; the registry only logs a failure, so look at each target afterwards."""
    for target, replacement in hooks.items():
        if target not in _CpuHooks._hooks:
            _CpuHooks.register(target, replacement, HookType.REPLACE)
    originals = {t: _resolve(t) for t in hooks if t not in _CpuHooks._patched}
    _CpuHooks.apply_hooks()
    failed = [t for t in hooks if t not in _CpuHooks._patched or _resolve(t) is originals.get(t)]
    if failed:
        raise RuntimeError(
            f"sglang-misa's CPU platform expected to replace {', '.join(failed)} in SGLang, and it did not happen; "
            f"install one of the versions that this platform is written for: {versions.known()}"
        )
