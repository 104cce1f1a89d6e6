"""`--check`: what would run, what it would cost and every reason against it, before any weight is loaded.

From flags, config.json and what is installed alone, so also on a machine without a GPU, torch or SGLang; what cannot
be known there is said.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from importlib import metadata
from types import SimpleNamespace
from typing import Any

from sglang_misa import admission, versions
from sglang_misa.arguments import Parser
from sglang_misa.config import PHASES, ConfigError, MisaConfig, Phase, SelectionPolicy, preset_name
from sglang_misa.kernels.layout import HEAD_DIM, PAGE, statistics_bytes
from sglang_misa.text_tables import ranges, table
from sglang_misa.validation import short

# Taken for granted where no folder tells: DeepSeek-V3.2's.
UNKNOWN_MODEL = {"index_n_heads": 64, "index_topk": 2048, "index_head_dim": HEAD_DIM, "architectures": ["unknown"]}
# SGLang's flags that the launcher reads itself.
READ = {
    *("--config", "--model-path", "--model", "--load-format", "--json-model-override-args", "--device"),
    *("--host", "--port", "--api-key", "--admin-api-key"),
    *("--ssl-keyfile-password", "--ssl-keyfile"),  # a secret to mask, and the flag that its name begins with
}
UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
ALIASES = {
    "tp_size": ("--tp", "--tensor-parallel-size"),
    "pp_size": ("--pp", "--pipeline-parallel-size"),
    "dcp_size": ("--dcp", "--decode-context-parallel-size"),
    "attn_cp_size": ("--attention-context-parallel-size",),
    "enable_hierarchical_cache": ("--enable-hicache",),
}


def report(
    config: MisaConfig | None, model: Mapping[str, Any] | None, device: str | None, words: Sequence[str]
) -> tuple[str, list[str]]:
    """(what would run, the reasons against it).

    model: config.json's content, None where it is not at hand; device: the word after --device, None without;
    words: SGLang's flags.
    """
    if config is None:
        return "sglang-misa is off: stock DSA selects in both phases (no --misa-* flag, no SGLANG_MISA_CONFIG)", []
    found = candidate(config, model, device, words, _capability())
    unread = config.unread(alone=_is_one_rank(words), context=found.arguments.context_length)
    paragraphs = [
        f"{_source(config)}; SGLang {found.sglang}; device {found.device}",
        table([("phase", "length", "selected by"), *_rows(config, found.model)]),
        _memory(config, found.model),
        *([f"without effect on this selection: {', '.join(unread)}"] if unread else []),
        "\n".join(["Not checked here:", *(f"  - {each}" for each in _unknown(found, model, words))]),
    ]
    return "\n\n".join(paragraphs), admission.problems(found)


def candidate(
    config: MisaConfig,
    model: Mapping[str, Any] | None,
    device: str | None,
    words: Sequence[str],
    capability: tuple[int, int] | None = None,
) -> admission.Candidate:
    """The rank that would be started, as far as flags and files tell; `_unknown` says what is taken for granted.

    capability: of this machine's GPU, None where it is not known.
    """
    on_cuda = device in (None, "cuda")
    sglang = _installed() or (versions.SUPPORTED[0] if on_cuda else versions.SUPPORTED[-1])
    return admission.Candidate(
        config=config,
        is_dsa=model is None or model.get("index_topk") is not None,
        model=SimpleNamespace(**(UNKNOWN_MODEL if model is None else model)),
        arguments=_arguments(words),
        sglang=sglang,
        device="cuda" if device is None else device,
        capability=(capability or admission.VERIFIED_CAPABILITY) if on_cuda else None,
    )


def _source(config: MisaConfig) -> str:
    """Where the policies come from."""
    if config.layers is None:
        return f"preset: {preset_name(config) or 'none by name'}"
    file = config.layers
    return f"policy file by {short(file.created_by)} for a recall of {file.target_recall:g} at {file.length} keys"


def _unknown(found: admission.Candidate, model: Mapping[str, Any] | None, words: Sequence[str]) -> Iterator[str]:
    if model is None:
        yield "the model's sizes, as --model-path is no folder: assumed to be DeepSeek-V3.2's"
    elif found.is_dsa:
        yield "whether SGLang serves this architecture with DSA: assumed, as config.json has index_topk"
    if _installed() is None:
        yield f"SGLang's version, as none is installed: assumed to be {found.sglang}, of {versions.known()}"
    if found.device == "cuda" and _capability() is None:
        yield "the GPU, as this machine has none: assumed to be a Hopper"
    unknown = _parser(abbreviations=False).parse_known_args(words)[1]
    flags = (word.partition("=")[0] for word in unknown if word.startswith("--"))
    if others := [flag for flag in dict.fromkeys(flags) if flag not in READ]:
        yield f"whether SGLang knows {', '.join(others)}, and accepts their values"
    yield "what SGLang derives from its flags, its --config file, the weights, and hooks of other plugins"


def _installed() -> str | None:
    try:
        return versions.installed()
    except metadata.PackageNotFoundError:
        return None


def _capability() -> tuple[int, int] | None:
    """Of this machine's first GPU; None without one, or without torch."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def _arguments(words: Sequence[str]) -> SimpleNamespace:
    """What admission asks of ServerArgs, as far as the flags themselves say it. Raises ConfigError."""
    given = _parser().parse_known_args(words)[0]
    if given.tp_size < 1:
        raise ConfigError([f"--tp-size: expected 1 or more, got {given.tp_size}; correct it"])
    decode = SimpleNamespace(backend=given.cuda_graph_backend_decode)
    return SimpleNamespace(**vars(given), cuda_graph_config=SimpleNamespace(decode=decode))


def _is_one_rank(words: Sequence[str]) -> bool:
    """Whether the flags start one tensor-parallel rank; false where SGLang's --config file may say more."""
    given, others = _parser().parse_known_args(words)
    return given.tp_size == 1 and not any(word.partition("=")[0] == "--config" for word in others)


def token_count(word: str) -> int:
    """A whole number as SGLang reads it: 131072, 131.072k or 128Ki. Raises ValueError."""
    word = word.strip()
    digits = word.rstrip("".join(UNITS))
    if word[len(digits) :] not in UNITS:
        raise ValueError(f"expected a whole number, or one with a unit such as 128k, got {word!r}; correct it")
    return int(Fraction(digits) * UNITS[word[len(digits) :]])


def _parser(*, abbreviations: bool = True) -> argparse.ArgumentParser:
    """Reads the flags that admission judges, with `abbreviations` also shortened ones, which SGLang completes.

    One that fits several flags of SGLang's is an error there. Without its own list of flags that stays unknown here.
    """
    parser = Parser(add_help=False, allow_abbrev=abbreviations)
    for rule in admission.ARGUMENTS + admission.DECODE_ARGUMENTS + admission.TRANSFER_ARGUMENTS:
        if rule.name == "speculative_algorithm":
            continue  # below: SGLang takes it in any case
        names = (rule.flag, *ALIASES.get(rule.name, ()))
        default = rule.allowed[0]
        if False in rule.allowed:
            action = argparse.BooleanOptionalAction if None in rule.allowed else "store_true"
            parser.add_argument(*names, action=action, default=default)
        else:
            number = any(isinstance(value, int) for value in rule.allowed)
            parser.add_argument(*names, type=int if number else str, default=default)
    parser.add_argument("--tp-size", *ALIASES["tp_size"], type=int, default=1)
    parser.add_argument("--page-size", type=int, default=PAGE)
    parser.add_argument("--context-length", type=token_count)
    parser.add_argument("--speculative-algorithm", type=str.upper)
    parser.add_argument("--speculative-num-draft-tokens", type=int)
    parser.add_argument("--cuda-graph-backend-decode", default="full")
    parser.add_argument("--disaggregation-transfer-backend", default="mooncake")
    return parser


def _rows(config: MisaConfig, model: Any) -> Iterator[tuple[str, str, str]]:
    for phase in PHASES:
        heads = getattr(model, "index_n_heads", None)
        under, over = _gate(config, phase)
        yield from ((phase, what, "stock DSA") for what in under)
        if config.layers is None:
            yield phase, over, _described(config.policy(phase), heads)
        for policy, layers in _layers(config, phase):
            yield phase, f"{over}, layers {layers}", _described(policy, heads)


def _gate(config: MisaConfig, phase: Phase) -> tuple[list[str], str]:
    """(what is under the gate of a phase, what is over it)."""
    gate, step = config.gate(phase), config.decoding
    if phase == "decode" and step.min_tokens:
        what, beyond = "a step whose rows together see", f" beyond {gate} for each" if gate else ""
        under = [f"{what} fewer than {step.min_tokens} tokens{beyond}"]
        over = f"{what} {step.min_tokens} tokens or more{beyond}"
    else:
        what = "a query that sees" if phase == "prefill" else "a step whose longest request has"
        under, over = [f"{what} up to {gate} tokens"] if gate else [], f"{what} more than {gate} tokens"
        over = over if gate else f"{what} any number of tokens"
    if phase == "decode" and step.min_rows > 1:
        under.append(f"a step of fewer than {step.min_rows} rows")
    return under, over


def _layers(config: MisaConfig, phase: Phase) -> Iterator[tuple[SelectionPolicy, str]]:
    """Each policy of a policy file, and its layers; nothing without such a file."""
    if config.layers is not None:
        every = config.layers.policies(phase)
        for policy in dict.fromkeys(every):
            yield policy, ranges([layer for layer, one in enumerate(every) if one == policy])


def _described(policy: SelectionPolicy, heads: int | None) -> str:
    if not policy.active:
        return "stock DSA"
    parts = []
    if policy.heads is not None:
        rest = ", the others as one column" if policy.residual else ""
        parts.append(f"{policy.heads} of {heads} heads by {policy.router}{rest}")
    if policy.blocks is not None:
        parts.append(f"tokens of the best {policy.blocks} blocks of {policy.block_size}")
    if policy.sketch is not None:
        parts.append(f"keys as {policy.sketch}-bit sketches")
    if policy.candidates is not None:
        parts.append(f"best {policy.candidates} scored again with all heads")
    if policy.tail:
        parts.append(f"all heads for the last {policy.tail} queries of a prompt")
    return f"{policy.name}: {'; '.join(parts) or 'all heads and tokens, without a score matrix'}"


def _memory(config: MisaConfig, model: Any) -> str:
    token = statistics_bytes(config.sketch) / PAGE
    layers = getattr(model, "num_hidden_layers", None)
    total = f", {token * layers:.0f} B a token in {layers} layers" if layers else ""
    return f"page statistics: {token:g} B a token and layer beside the index-K's {HEAD_DIM + 4} B{total}"
