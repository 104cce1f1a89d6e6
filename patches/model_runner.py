"""SGLang's ModelRunner: where every rank is admitted, armed and checked. Whatever is raised here stops the launch."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
from sglang.srt.arg_groups.overrides import resolved_view
from sglang.srt.configs.model_config import is_deepseek_dsa
from sglang.srt.mem_cache.allocation_sizing import get_req_to_token_extra_context_len
from sglang.srt.runtime_context import get_parallel
from torch import distributed, nn

from sglang_misa import admission, canary, runtime, versions
from sglang_misa.admission import AdmissionError
from sglang_misa.config import ENV, PHASES, ConfigError, MisaConfig
from sglang_misa.metrics import recorder
from sglang_misa.patches import register
from sglang_misa.patches.pool import selector_of
from sglang_misa.policy_file import ModelIdentity

logger = logging.getLogger(__name__)

MEETING = timedelta(minutes=5)  # tensor-parallel ranks leave load_model together, pipeline stages later
_STOCK = "serve it without --misa-* flags"


def load_model(original: Callable[..., None], self: Any) -> None:
    """ModelRunner.load_model: admits and arms this rank before the weights, and checks the loaded indexers after.

    A draft worker is a second ModelRunner of the process and selects with the target's settings.
    """
    if not self.is_draft_worker:
        _arm(self)
    original(self)
    if not self.is_draft_worker or is_deepseek_dsa(self.model_config.hf_config):
        AdmissionError.raise_if([*_indexer_problems(self.model), *register.problems()])
        self.misa_layers = _mark_last(self.model)
    armed = runtime.current()
    if armed.kernels and not self.is_draft_worker:
        from sglang_misa.engines import kernels

        kernels.warm_up(armed)


def forward(original: Callable[..., Any], self: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    """ModelRunner.forward: one step, eager or a graph's replay. After it, canary and ranks look at what it did."""
    result = original(self, forward_batch, *args, **kwargs)
    requests = forward_batch.rids or ()
    rows = (self.req_to_token_pool.req_to_token, forward_batch.req_pool_indices, forward_batch.seq_lens)
    if (watching := canary.of_runner(self)) is not None:
        watching.step(*rows, requests)
    if (selector := selector_of(self)) is not None and selector.agreement is not None:
        selector.agreement.step(*rows, len(requests))
    return result


def init_cuda_graphs(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """ModelRunner.init_cuda_graphs: the last look before this rank serves, and one at the graphs."""
    AdmissionError.raise_if([*register.problems(), *([] if self.is_draft_worker else _serving_problems(self))])
    if distributed.is_initialized() and not self.is_draft_worker:
        _meet(distributed.distributed_c10d._get_default_store(), runtime.current(), MEETING)
    recorder.publish_page_stats()
    original(self, *args, **kwargs)
    selector = selector_of(self)
    if selector is not None and selector.agreement is not None:
        selector.agreement.forget()
    if selector is not None and selector.engine.behind:
        AdmissionError.raise_if(
            ["expected captured decode steps to end with their page statistics, got none; report this model"]
        )


def _serving_problems(runner: Any) -> Iterator[str]:
    """Sentences for a pool that may map or move pages in a way of its own, and for attention without an indexer."""
    from sglang.srt.layers.attention.dsa_backend import DeepseekSparseAttnBackend
    from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool

    for what, found, expected in (
        ("KV pool", runner.token_to_kv_pool, DSATokenToKVPool),
        ("attention backend", runner.attn_backend, DeepseekSparseAttnBackend),
    ):
        if type(found) is not expected:
            yield f"{what}: expected SGLang's {expected.__name__}, got {type(found).__name__}; {_STOCK}"
    row_len = runner.req_to_token_pool.req_to_token.shape[1]
    if row_len > runtime.current().row_len:
        yield f"table of requests: expected rows of {runtime.current().row_len} tokens, got {row_len}; {_STOCK}"


def _arm(runner: Any) -> None:
    """Admission, then the patches, then the runtime: nothing is left half done but a process that dies."""
    try:
        config = MisaConfig.from_env()
    except ConfigError as error:
        raise AdmissionError(error.problems) from None
    if config is None:
        raise AdmissionError(
            [f"expected the settings in {ENV}, got none: it was set when this process started; set it again"]
        )
    model = runner.model_config.hf_config
    admission.check(_candidate(runner, config))
    register.apply(versions.installed())
    alone = not distributed.is_initialized()
    armed = runtime.Runtime(
        config=config,
        index_heads=model.index_n_heads,
        topk=model.index_topk,
        row_len=_row_len(runner),
        device=runner.device,
        rank=0 if alone else distributed.get_rank(),
        ranks=1 if alone else distributed.get_world_size(),
        model=ModelIdentity.of(model),
        peers=_peers(),
    )
    runtime.arm(armed)
    version = versions.installed()
    verified = versions.problem(version, runner.device, allow_unverified=False) is None
    recorder.armed(config, armed.rank, armed.ranks, sglang=version, verified=verified)
    if resolved_view(runner.server_args).enable_metrics:
        parallel = runner.ps if hasattr(runner, "ps") else get_parallel()  # the runner's own until 0.5.22
        ranks = {"tp_rank": parallel.tp_rank, "pp_rank": parallel.pp_rank, "dp_rank": parallel.dp_rank}
        recorder.export(config, version, **ranks)
    _tell(config, alone=armed.peers is None, context=int(runner.model_config.context_len))
    if not verified:
        logger.warning("SGLang %s is not verified on this device; verified are %s", version, versions.known())


def _tell(config: MisaConfig, *, alone: bool, context: int) -> None:
    """Log what selects, and the settings that have no effect; alone and context as for `MisaConfig.unread`."""
    if config.active:
        names = ", ".join(f"{phase} {config.name(phase)}" for phase in PHASES)
        logger.info("sglang-misa selects the tokens of sparse attention: %s", names)
    else:
        logger.info("sglang-misa leaves both phases to stock DSA, as the configuration has no other policy")
    if unread := config.unread(alone=alone, context=context):
        logger.warning("without effect on this selection: %s", ", ".join(unread))


def _row_len(runner: Any) -> int:
    """Tokens of a row of SGLang's table of requests: more than the context, as drafts may be written past it."""
    extra = get_req_to_token_extra_context_len  # takes the server's arguments until 0.5.22
    arguments = [runner.server_args][: len(inspect.signature(extra).parameters)]
    return int(runner.model_config.context_len) + int(extra(*arguments))


def _peers() -> Any:
    """The process group, on the CPU, of the ranks that select for the same requests; None for one rank."""
    if not distributed.is_initialized():
        return None
    group = get_parallel().attn_tp_group
    return group.cpu_group if group.world_size > 1 else None


def _candidate(runner: Any, config: MisaConfig) -> admission.Candidate:
    on_cuda = runner.device == "cuda" and torch.version.hip is None
    return admission.Candidate(
        config=config,
        is_dsa=is_deepseek_dsa(runner.model_config.hf_config),
        model=runner.model_config.hf_config,
        arguments=resolved_view(runner.server_args),
        sglang=versions.installed(),
        device="hip" if runner.device == "cuda" and not on_cuda else runner.device,
        capability=torch.cuda.get_device_capability(runner.gpu_id) if on_cuda else None,
    )


def _indexer_problems(model: nn.Module) -> Iterator[str]:
    """Sentences for every indexer of `model` that would not come by our hooks, or whose weights are broken."""
    from sglang.srt.layers.attention.dsa.dsa_indexer import Indexer

    armed = runtime.current()
    indexers = {name: module for name, module in model.named_modules() if isinstance(module, Indexer)}
    if not indexers:
        yield f"expected DSA indexers in {type(model).__name__}, got none; {_STOCK}"
    for name, module in indexers.items():
        for hooked in ("forward_cuda", "_get_topk_paged", "_get_topk_ragged", "_forward_cuda_k_only"):
            if getattr(type(module), hooked) is not getattr(Indexer, hooked):
                yield f"{name}: expected SGLang's Indexer.{hooked}, got that of {type(module).__name__}; {_STOCK}"
        method = module._forward_method or module._resolve_forward_method()  # since 0.5.18 chosen at the first call
        forward = getattr(method, "__func__", method)
        if forward is not Indexer.forward_cuda:
            yield f"{name}: expected forward to be Indexer.forward_cuda, got {forward!r}; {_STOCK}"
        if module.n_heads != armed.index_heads or module.index_topk != armed.topk:
            yield (
                f"{name}: expected H={armed.index_heads} and k={armed.topk} as in the model's config, got "
                f"H={module.n_heads} and k={module.index_topk}; {_STOCK}"
            )
        for weight, tensor in module.named_parameters():
            if tensor.is_floating_point() and not tensor.float().isfinite().all():
                yield f"{name}.{weight}: expected finite weights, got NaN or infinity; check the checkpoint's files"


def _mark_last(model: nn.Module) -> list[int]:
    """Set `misa_last` on every indexer: True on the one that a step runs last, in whose hook the step's upkeep is done.

    Layers that share another's selection (`skip_topk`) run none, but for a NextN layer. Returns the ids of the others.
    """
    from sglang.srt.layers.attention.dsa.dsa_indexer import Indexer

    running = []
    for name, module in model.named_modules():
        if isinstance(module, Indexer):
            module.misa_last = False
            attention = model.get_submodule(name.rpartition(".")[0])
            if not getattr(attention, "skip_topk", False) or getattr(attention, "is_nextn", False):
                running.append(module)
    max(running, key=lambda module: module.layer_id).misa_last = True
    return sorted(module.layer_id for module in running)


def _meet(store: distributed.Store, armed: runtime.Runtime, timeout: timedelta) -> None:
    """Return when every rank is armed with the same settings; raise AdmissionError otherwise, or after `timeout`.

    Through the process group's store, not a collective: a rank without the plugin does not know that it should answer.
    """
    mine = armed.config.to_json()
    keys = {rank: f"{__name__}/{rank}" for rank in range(armed.ranks)}
    store.set(keys[armed.rank], mine)
    try:
        store.wait(list(keys.values()), timeout)
    except distributed.DistStoreError:
        missing = [rank for rank, key in keys.items() if not store.check([key])]
        raise AdmissionError(
            [f"expected all {armed.ranks} ranks armed, got nothing from {missing}; set {ENV} and install there too"]
        ) from None
    others = {rank: store.get(key).decode() for rank, key in keys.items()}
    AdmissionError.raise_if(
        [
            f"rank {rank}: expected the settings of rank {armed.rank}, {mine}, got {theirs}; set {ENV} alike"
            for rank, theirs in others.items()
            if theirs != mine
        ]
    )
