"""The arms of the server tests, and which of them run side by side."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gpu.server.servers import PREFILL_GRAPHS, Answer

from sglang_misa.config import PRESETS

NEW_TOKENS = 8
# SGLang's own top-k kernel is approximate where scores crowd together: compare beneath torch's.
EXACT_TOPK = ["--dsa-topk-backend", "torch", "--enable-return-indexer-topk"]
EXACT_ENV = {"SGLANG_DSA_FUSE_TOPK": "0"}
# Drafts of one branch: SGLang's own choice for DeepSeek models.
DRAFTS = (
    "--speculative-algorithm EAGLE --speculative-num-steps 3 --speculative-eagle-topk 1 "
    "--speculative-num-draft-tokens 4"
)
# Extends of several requests then read their selection as offsets into a copy of their keys (SGLang's RAGGED top-k).
FP8_KV = "--kv-cache-dtype fp8_e4m3 --dsa-decode-backend flashmla_kv"

ALL_HEADS = {"heads": 64, "min_len": 0}
PAPER = {"heads": 8, "min_len": 0}
AUDIT = {"rows": 8, "every": 64}  # the first call of a layer, in the warm-up, then seldom
BLOCKS = {"blocks": 64, "block_size": 128}
GATED = {"prefill": PAPER | {"min_len": 8192}, "decode": BLOCKS | {"min_len": 32768}}
HISA = GATED | {"prefill": BLOCKS | {"min_len": 8192}}  # as many tokens as 64 blocks hold: beyond it some are dropped
GATES = {"prefill": {"min_len": 8192}, "decode": {"min_len": 32768, "min_rows": 1, "min_tokens": 0}}


def preset(name: str) -> dict[str, Any]:
    """A preset under gates that these prompts pass one at a time."""
    policies = {phase: PRESETS[name].policy(phase).model_copy(update=gate) for phase, gate in GATES.items()}
    return {phase: policy.model_dump(mode="json", exclude_defaults=True) for phase, policy in policies.items()}


FAST, FAITHFUL = preset("fast"), preset("faithful")
ARMS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "all-heads": {"prefill": ALL_HEADS, "decode": ALL_HEADS, "backend": "torch"},
    "misa-torch": {"prefill": PAPER, "decode": PAPER, "backend": "torch", "audit": AUDIT},
    "misa": {"prefill": PAPER, "audit": AUDIT},
    "misa-hier": {"prefill": PAPER | {"candidates": 8192}, "audit": AUDIT},
    "misa-hisa": GATED | {"audit": AUDIT},
    "misa-hisa-torch": GATED | {"backend": "torch"},
    "hisa": HISA | {"audit": AUDIT},
    "hisa-torch": HISA | {"backend": "torch"},
    "exact": {"prefill": {"exact": True, "min_len": 0}},
    "fast": FAST | {"audit": AUDIT},
    "fast-torch": FAST | {"backend": "torch"},
    "faithful": FAITHFUL | {"audit": AUDIT},
    "faithful-torch": FAITHFUL | {"backend": "torch"},
}


@dataclass(frozen=True)
class Setup:
    """Servers that run side by side on one seeded random model, and the prompts that each of them gets."""

    arms: tuple[str, ...]
    lengths: tuple[int, ...]
    flags: tuple[str, ...] = ()
    prefill_graphs: bool = False


SETUPS = {
    "decode-graphs": Setup(("stock", "all-heads", "misa-hisa", "misa-hisa-torch"), (4096, 32768, 131072)),
    "prefill-graphs": Setup(
        ("stock", "misa-hisa", "misa-hier", "hisa", "hisa-torch"),
        (4096, 32768, 65536),
        (*PREFILL_GRAPHS.split(), "--max-total-tokens", "131072"),
        prefill_graphs=True,
    ),
    "fp8-kv": Setup(
        ("stock", "exact", "fast", "fast-torch"), (4096, 40960), (*FP8_KV.split(), "--max-total-tokens", "131072")
    ),
    "ours": Setup(
        ("stock", "exact", "fast", "fast-torch", "faithful", "faithful-torch"),
        (4096, 40960),
        ("--max-total-tokens", "131072"),
    ),
}


@dataclass
class Served:
    """What the servers of a setup answered."""

    setup: Setup
    answers: dict[str, list[Answer]] = field(default_factory=dict)  # by arm, one a prompt
    steps: dict[str, list[dict[str, int]]] = field(default_factory=dict)  # decode steps by side of the gate, so too
    again: dict[str, Answer] = field(default_factory=dict)  # the last prompt once more, from the radix cache
    shared: dict[str, list[str]] = field(default_factory=dict)  # problems of requests that share an extend call
    status: dict[str, dict[str, Any]] = field(default_factory=dict)
