"""What token selection needs of SGLang's version, the model, the device and the server arguments.

Each check is a function over plain attributes that yields one sentence per reason to refuse: expected, got, what to do.
All reasons are reported together, before any weight is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from sglang_misa import dump_folder, versions
from sglang_misa.config import PHASES, ConfigError, MisaConfig, Phase, SelectionPolicy
from sglang_misa.kernels import layout
from sglang_misa.kernels.layout import HEAD_DIM, PAGE
from sglang_misa.refusal import Refusal

VERIFIED_CAPABILITY = (9, 0)


class AdmissionError(Refusal, RuntimeError):
    """A server that cannot select tokens as asked must not start."""

    opening = "sglang-misa stops the launch"


@dataclass(frozen=True)
class Candidate:
    """One rank about to load a model."""

    config: MisaConfig
    is_dsa: bool  # SGLang's own is_deepseek_dsa
    model: Any  # Hugging Face config
    arguments: Any  # sglang ServerArgs, as SGLang has resolved them
    sglang: str  # version
    device: str  # "cuda", "hip", "cpu", "npu", "xpu", …
    capability: tuple[int, int] | None  # of a CUDA device

    @property
    def decodes(self) -> bool:
        """Whether a policy selects in decode, in any layer."""
        return self.config.gate("decode") is not None

    @property
    def is_transferred_to(self) -> bool:
        """Whether a policy selects in decode on pages that a prefill server wrote."""
        return self.decodes and getattr(self.arguments, "disaggregation_mode", "null") == "decode"

    @property
    def on_kernels(self) -> bool:
        """Whether GPU kernels select, which are written for fewer shapes than the PyTorch reference."""
        return self.config.on_kernels(self.device)


class _Argument(NamedTuple):
    """A server argument that must keep one of the `allowed` values, and why."""

    name: str
    allowed: tuple[Any, ...]
    why: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


_STOCK_DECODE = "leave decode to stock DSA (--misa-decode dsa)"
_INERT = "with it SGLang serves this model without ever asking an indexer"
_DSA = (None, "dsa", "nsa")
_EVERY_SM = "a kernel of each layer waits for every multiprocessor, and this holds some of them, untested"
_SPLIT = "this rank would hold only a part of the keys that a query sees"
_EXTERNAL = "an external cache writes index-K pages behind the indexer, untested"
ARGUMENTS = (
    _Argument("attention_backend", _DSA, _INERT),
    _Argument("prefill_attention_backend", _DSA, _INERT),
    _Argument("decode_attention_backend", _DSA, _INERT),
    _Argument("enable_nvidia_megakernel", (False,), "a decode step in one kernel never asks an indexer"),
    _Argument("enable_dsa_fused_indexer", (None, False), "it selects past the functions hooked here"),
    _Argument("enable_mixed_chunk", (False,), "decode rows in a prefill step would get the prefill policy"),
    _Argument("enable_prefill_cp", (False,), _SPLIT),
    _Argument("attn_cp_size", (1,), _SPLIT),
    _Argument("dcp_size", (1,), _SPLIT),
    _Argument("enable_kv_cache_sharding", (False,), _SPLIT),
    _Argument("enable_dsa_cache_layer_split", (False,), "each rank would hold only some layers' index-K"),
    _Argument("enable_hisparse", (False,), "its pool maps pages differently, untested"),
    _Argument("enable_flexkv", (False,), _EXTERNAL),
    _Argument("enable_lmcache", (False,), _EXTERNAL),
    _Argument("radix_cache_backend", (None,), _EXTERNAL),
    _Argument("enable_unified_cache_external_linker", (False,), _EXTERNAL),
    _Argument("enable_unified_memory", (False,), "it moves pages without their means, untested"),
    _Argument("speculative_eagle_topk", (None, 1), "tree drafts move index-K between pages behind the indexer"),
    _Argument("pp_size", (1,), _EVERY_SM),
    _Argument("enable_pdmux", (False,), _EVERY_SM),
    _Argument("enable_two_batch_overlap", (False,), _EVERY_SM),
    _Argument("startup_weight_load_mode", ("serial",), "the indexers are checked before their weights would be there"),
    _Argument("enable_deterministic_inference", (False,), "the order of the selected tokens varies from run to run"),
    _Argument("enable_torch_compile", (False,), "Dynamo would trace through the hooks, untested"),
)
_COPIES = "decode on pages that other copies of a host cache restored is untested"
DECODE_ARGUMENTS = (
    _Argument("disaggregation_mode", ("null", "decode"), "a prefill server decodes nothing"),
    _Argument("hicache_mem_layout", ("page_first", "layer_first", "page_first_direct"), _COPIES),
    _Argument("hicache_io_backend", ("kernel", "direct"), _COPIES),
    _Argument("hicache_storage_backend", (None, "file"), "decode on pages from other storage than files is untested"),
    _Argument("hicache_host_memory_mode", ("cache",), "decode on pages that the host only buffers is untested"),
)
STORAGE_TRIED = ("0.5.23",)  # versions whose host cache was tried on files; 0.5.17's waits for ever on the CPU platform
CHAINED_DRAFTS = ("EAGLE", "EAGLE3", "NEXTN", "STANDALONE")  # algorithms whose accepted drafts stay where they are
_BESIDE = "beside pages that a prefill server wrote it is untested"
TRANSFER_ARGUMENTS = (
    _Argument("speculative_algorithm", (None,), _BESIDE),
    _Argument("enable_hierarchical_cache", (False,), _BESIDE),
    _Argument("disaggregation_decode_enable_radix_cache", (False,), _BESIDE),
    _Argument("disaggregation_decode_enable_offload_kvcache", (False,), _BESIDE),
)


def _architecture(candidate: Candidate) -> Iterator[str]:
    if not candidate.is_dsa:
        name = (getattr(candidate.model, "architectures", None) or ["none"])[0]
        yield (
            "model: expected one that SGLang serves with DeepSeek Sparse Attention, got "
            f"{name} with index_topk={getattr(candidate.model, 'index_topk', None)}; serve it without --misa-* flags"
        )


def _index_heads(candidate: Candidate) -> Iterator[str]:
    heads = getattr(candidate.model, "index_n_heads", None)
    if candidate.is_dsa and candidate.on_kernels and heads not in layout.INDEX_HEADS:
        yield (
            f"model: expected index_n_heads of {' or '.join(map(str, layout.INDEX_HEADS))} for the GPU kernels, "
            f"got {heads}; add --misa-backend torch"
        )


_REFERENCE = "or add --misa-backend torch (any policy, far slower than stock)"


def _kernel_policies(candidate: Candidate) -> Iterator[str]:
    """Policies that the reference can follow and the GPU kernels cannot."""
    if not (candidate.is_dsa and candidate.on_kernels):
        return
    config = candidate.config
    for phase, policy in [(kind, policy) for kind in PHASES for policy in config.policies(kind)]:
        if policy.columns is not None and policy.columns not in layout.ROUTED_HEADS:
            yield (
                f"{phase}.heads: expected one of {layout.ROUTED_HEADS} on GPU kernels, a residual counted as one, got "
                f"{policy.columns}; set --misa-{phase}-heads to one of them, less one for a residual, {_REFERENCE}"
            )
        if policy.candidates is not None and policy.candidates > layout.MAX_CANDIDATES:
            yield (
                f"{phase}.candidates: expected at most {layout.MAX_CANDIDATES} on GPU kernels, got "
                f"{policy.candidates}; lower --misa-{phase}-candidates, {_REFERENCE}"
            )
    for policy in candidate.config.policies("prefill"):
        yield from _prefill_kernels(policy, candidate.model.index_topk)
    for policy in candidate.config.policies("decode"):
        yield from _decode_kernels(policy)


def _forced_tokens(candidate: Candidate) -> Iterator[str]:
    forced = [n for n in ("index_init_tokens", "index_local_tokens") if getattr(candidate.model, n, 0)]
    if forced and candidate.config.active:
        yield f"model: expected no forced tokens, got {' and '.join(forced)}; serve it without --misa-* flags"


def _prefill_kernels(policy: SelectionPolicy, topk: int) -> Iterator[str]:
    if policy.blocks is not None and (policy.heads is not None or policy.candidates is not None):
        yield (
            "prefill.blocks: expected all heads and no candidates with it on GPU kernels, got "
            f"heads={policy.heads}, candidates={policy.candidates}; set --misa-prefill-blocks all, {_REFERENCE}"
        )
    # While it narrows a row down, prefill lists k / 2 more.
    yield from _kept_tokens("prefill", policy, layout.MAX_KEPT_PREFILL - topk // 2)


def _decode_kernels(policy: SelectionPolicy) -> Iterator[str]:
    yield from _kept_tokens("decode", policy, layout.MAX_KEPT_DECODE)
    if policy.sketch is None:
        for axis in ("heads", "candidates"):
            if (value := getattr(policy, axis)) is not None:
                yield (
                    f"decode.{axis}: expected none without a sketch on GPU kernels, as decode waits for the bytes of "
                    f"the keys, got {value}; set --misa-decode-sketch, {_REFERENCE}"
                )
        return
    if policy.blocks is not None:
        yield (
            f"decode.blocks: expected all with a sketch on GPU kernels, got {policy.blocks}; set --misa-decode-blocks "
            f"all, {_REFERENCE}"
        )
    if policy.heads is not None and policy.block_size != PAGE:
        yield (
            f"decode.block_size: expected {PAGE} with a sketch on GPU kernels, which route on page means, got "
            f"{policy.block_size}; set --misa-decode-block-size {PAGE}, {_REFERENCE}"
        )
    if policy.candidates is not None and policy.candidates % PAGE:
        yield (
            f"decode.candidates: expected a multiple of {PAGE} on GPU kernels, got {policy.candidates}; change "
            f"--misa-decode-candidates, {_REFERENCE}"
        )


def _kept_tokens(phase: Phase, policy: SelectionPolicy, most: int) -> Iterator[str]:
    kept = 0 if policy.blocks is None else (policy.blocks + 1) * policy.block_size
    if kept > most:
        yield (
            f"{phase}.blocks: expected (blocks + 1) × block_size of at most {most} tokens on GPU kernels, got {kept}; "
            f"lower --misa-{phase}-blocks, {_REFERENCE}"
        )


def _head_dim(candidate: Candidate) -> Iterator[str]:
    size = getattr(candidate.model, "index_head_dim", None)
    if candidate.is_dsa and size != HEAD_DIM:
        yield f"model: expected index_head_dim {HEAD_DIM}, got {size}; serve it without --misa-* flags"


def _pooled_keys(candidate: Candidate) -> Iterator[str]:
    pooled = getattr(candidate.model, "index_kpool", None) or 1
    if pooled != 1:
        yield f"model: expected one index key a token, got index_kpool={pooled}; serve it without --misa-* flags"


def _page_size(candidate: Candidate) -> Iterator[str]:
    if candidate.is_dsa and candidate.arguments.page_size != PAGE:
        yield f"--page-size: expected {PAGE}, got {candidate.arguments.page_size}; drop the flag, SGLang picks {PAGE}"


def _device(candidate: Candidate) -> Iterator[str]:
    if candidate.device not in ("cuda", "cpu"):
        yield (
            f"--device: expected cuda, or cpu with the platform of this package, got {candidate.device!r}, "
            "which scores through other code; serve without --misa-* flags"
        )
    elif candidate.device == "cpu" and candidate.config.backend == "kernels":
        yield "--misa-backend: expected auto or torch without a GPU, got kernels; drop the flag"
    elif candidate.on_kernels and candidate.capability != VERIFIED_CAPABILITY:
        yield (
            f"device: expected compute capability {_dotted(VERIFIED_CAPABILITY)} (Hopper) for the GPU kernels, got "
            f"{_dotted(candidate.capability)}; add --misa-backend torch (slow, and untested on this GPU)"
        )


def _arguments(candidate: Candidate) -> Iterator[str]:
    rules = ARGUMENTS + (DECODE_ARGUMENTS if candidate.decodes else ())
    rules += TRANSFER_ARGUMENTS if candidate.is_transferred_to else ()
    for rule in rules:
        value = getattr(candidate.arguments, rule.name, rule.allowed[0])  # not every version has every one
        if value not in rule.allowed:
            also = "" if rule in ARGUMENTS else f", or {_STOCK_DECODE}"
            allowed = " or ".join(map(repr, rule.allowed))
            yield f"{rule.flag}: expected {allowed}, got {value!r}: {rule.why}; drop the flag{also}"


def _drafts(candidate: Candidate) -> Iterator[str]:
    """NGRAM's branch: its breadth bounds the continuations of one match, and a step drafts those of several."""
    algorithm = getattr(candidate.arguments, "speculative_algorithm", None)
    if algorithm == "NGRAM":
        yield (
            "--speculative-algorithm: expected none or one whose drafts are a chain, got NGRAM: its drafts branch at "
            "any --speculative-ngram-max-bfs-breadth, and the accepted ones move index-K behind the indexer; drop the "
            "flag"
        )
    elif algorithm not in (None, *CHAINED_DRAFTS) and not candidate.config.allow_unverified:
        yield (
            f"--speculative-algorithm: expected none or one of {', '.join(CHAINED_DRAFTS)}, got {algorithm}: whether "
            "its drafts move index-K behind the indexer was not tried; add --misa-allow-unverified, or drop the flag"
        )


def _stored(candidate: Candidate) -> Iterator[str]:
    backend = getattr(candidate.arguments, "hicache_storage_backend", None)
    untried = candidate.sglang not in STORAGE_TRIED and not candidate.config.allow_unverified
    if candidate.decodes and backend == "file" and untried:
        yield (
            f"--hicache-storage-backend: expected None with a decode policy on SGLang {candidate.sglang}, got 'file': "
            f"tried with {', '.join(STORAGE_TRIED)} alone; install that, add --misa-allow-unverified, or drop the flag"
        )


def _transferred(candidate: Candidate) -> Iterator[str]:
    backend = getattr(candidate.arguments, "disaggregation_transfer_backend", "mooncake")
    if candidate.is_transferred_to and backend != "mooncake" and not candidate.config.allow_unverified:
        yield (
            f"--disaggregation-transfer-backend: expected mooncake with a decode policy, got {backend}: no other was "
            f"tried; add --misa-allow-unverified, or {_STOCK_DECODE}"
        )


def _decode_steps(candidate: Candidate) -> Iterator[str]:
    """What the gate and the upkeep of page means take for granted of decode steps."""
    if not (candidate.decodes and candidate.on_kernels):
        return
    graphs = candidate.arguments.cuda_graph_config  # None means SGLang's default, full
    if graphs is not None and graphs.decode.backend == "breakable":
        yield (
            "--cuda-graph-backend-decode: expected full, got breakable: the length gate chooses between two full "
            f"graphs; drop the flag, or {_STOCK_DECODE}"
        )
    drafts = candidate.arguments.speculative_num_draft_tokens or 0
    if drafts > PAGE:
        yield (
            f"--speculative-num-draft-tokens: expected at most {PAGE}, got {drafts}: a step may complete one page a "
            f"request; lower it, or {_STOCK_DECODE}"
        )


def _dump(candidate: Candidate) -> Iterator[str]:
    yield from dump_folder.problems(candidate.config.dump, getattr(candidate.model, "num_hidden_layers", None))


def _version(candidate: Candidate) -> Iterator[str]:
    allowed = candidate.config.allow_unverified
    if problem := versions.problem(candidate.sglang, candidate.device, allow_unverified=allowed):
        yield problem


def _policies(candidate: Candidate) -> Iterator[str]:
    if not candidate.is_dsa:
        return
    try:
        heads = getattr(candidate.model, "index_n_heads", None)
        candidate.config.check(index_heads=heads, topk=candidate.model.index_topk)
        if candidate.config.layers is not None:
            yield from candidate.config.layers.model_problems(candidate.model)
    except ConfigError as error:
        yield from error.problems


CHECKS: tuple[Callable[[Candidate], Iterator[str]], ...] = (
    _version,
    _architecture,
    _index_heads,
    _kernel_policies,
    _forced_tokens,
    _head_dim,
    _pooled_keys,
    _page_size,
    _device,
    _arguments,
    _drafts,
    _stored,
    _transferred,
    _decode_steps,
    _dump,
    _policies,
)


def check_version(version: str) -> None:
    """Raise AdmissionError unless SGLang `version` is a supported one; whether on this device, `check` says."""
    if problem := versions.problem(version, "cpu", allow_unverified=True):
        raise AdmissionError([problem])


def problems(candidate: Candidate) -> list[str]:
    """Every reason to refuse `candidate`, in the order of CHECKS."""
    return [problem for check in CHECKS for problem in check(candidate)]


def check(candidate: Candidate) -> None:
    """Raise AdmissionError with every reason to refuse `candidate`."""
    AdmissionError.raise_if(problems(candidate))


def _dotted(capability: tuple[int, int] | None) -> str:
    return ".".join(map(str, capability)) if capability else "none"
