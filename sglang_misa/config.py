"""What the user chooses: one `SelectionPolicy` for prefill, one for decode, and the few settings around them.

The same `MisaConfig` is written as one JSON object in SGLANG_MISA_CONFIG (the launcher's children and plain `sglang
serve` read that), as a JSON file, or as `--misa-*` flags of the launcher (`flags.py`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from sglang_misa.kernels.layout import PAGE, Router
from sglang_misa.policy import MOST, PHASES, STOCK, Phase, SelectionPolicy, renamed
from sglang_misa.policy_file import PolicyFile
from sglang_misa.validation import ConfigError, parsed, validated

__all__ = [  # the names of its parts too
    "PHASES",
    "Audit",
    "ConfigError",
    "Dump",
    "MisaConfig",
    "Phase",
    "Router",
    "SelectionPolicy",
]

ENV = "SGLANG_MISA_CONFIG"
MOST_BYTES = (1 << 17) - len(f"{ENV}=") - 1  # of it: what Linux hands on to a process in one variable

Backend = Literal["auto", "kernels", "torch"]
VerifyStats = Literal["off", "log", "raise"]


class Audit(BaseModel):
    """Recall of live selections against the dense indexer, and what happens when it sinks."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    rows: int = Field(
        0,
        ge=0,
        le=MOST,
        description="query rows of each audited call that are compared with all heads; 0 turns the audit off",
    )
    every: int = Field(
        64, ge=1, le=MOST, description="audit one in this many calls of a layer, and replays of a decode graph"
    )
    decode_layers: int = Field(8, ge=1, le=MOST, description="with decode graphs, audit one in this many layers")
    floor: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="a layer whose mean audited recall is lower falls back to faithful, then to stock DSA, and decode "
        "as a whole to stock DSA; 0 turns this off",
    )


class Dump(BaseModel):
    """Index tensors of long prompts, written for `bench.selection` and `calibrate`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    folder: str | None = Field(
        None,
        pattern=r"^[^\x00]+$",
        description="write index keys, sampled queries and head gates of long prompts to this folder",
    )
    rows: int = Field(
        64, ge=1, le=MOST, description="query rows written for each prompt and layer, from the last chunk"
    )
    layers: tuple[int, ...] | None = Field(
        None, min_length=1, description="layers to dump, as in 0,30,60; 'all' dumps every layer"
    )
    gib: float = Field(
        4.0,
        gt=0,
        allow_inf_nan=False,
        description="GiB that each rank may write; a prompt that would exceed it is left out",
    )

    @property
    def path(self) -> Path | None:
        """The folder, with the home of a user in the place of ~, where there is such a user."""
        return None if self.folder is None else Path(os.path.expanduser(self.folder))

    @field_validator("layers", mode="before")
    @classmethod
    def _list(cls, layers: object) -> object:
        return tuple(layers) if isinstance(layers, list) else layers  # JSON has no tuples


class MisaConfig(BaseModel):
    """Everything sglang-misa reads. Build one with `from_json`, `flags.from_flags` or `PRESETS[name]`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    prefill: SelectionPolicy = SelectionPolicy()
    decode: SelectionPolicy = SelectionPolicy()
    audit: Audit = Audit()
    dump: Dump = Dump()
    layers: PolicyFile | None = Field(
        None, description="a policy for each layer (python -m sglang_misa.calibrate), in the place of the two above"
    )
    backend: Backend = Field(
        "auto",
        description="auto = kernels (CUDA and Triton) on a GPU and PyTorch elsewhere; torch = the reference",
    )

    verify_stats: VerifyStats = Field(
        "off",
        description="recompute a sample of page statistics at each step and compare it bit by bit: log reports a "
        "mismatch, raise stops the server",
    )
    verify_ranks: int = Field(
        0,
        ge=0,
        le=MOST,
        description="once in this many steps tensor-parallel ranks compare their selections and page statistics, and a "
        "difference stops the server; 0 turns this off",
    )
    allow_unverified: bool = Field(
        False,
        description="serve on a GPU with a version of SGLang that was verified on CPUs only, and decode by a policy "
        "behind a prefill server with KV transfer other than Mooncake's, or beside a host cache on files that was not "
        "tried with this version, and with drafts by an algorithm that was not tried",
    )

    @field_validator("backend", mode="before")
    @classmethod
    def _renamed_backend(cls, word: object) -> object:
        return renamed("backend", word)

    def policy(self, phase: Phase, layer: int | None = None) -> SelectionPolicy:
        """The policy of a phase; with `layers` the one of that layer (None: a draft model's, which is not in it)."""
        if self.layers is not None and layer is not None:
            return self.layers.policies(phase)[layer]
        return self.prefill if phase == "prefill" else self.decode

    def policies(self, phase: Phase) -> tuple[SelectionPolicy, ...]:
        """The different policies of a phase, stock DSA's among them, in the order of the layers."""
        every = (self.policy(phase),) if self.layers is None else self.layers.policies(phase)
        return tuple(dict.fromkeys(every))

    def name(self, phase: Phase) -> str:
        """The name of the phase's policy, or of its policies."""
        return "|".join(dict.fromkeys(policy.name for policy in self.policies(phase)))

    def gate(self, phase: Phase) -> int | None:
        """Tokens up to which stock DSA selects in every layer; None where it always does."""
        return min((policy.min_len for policy in self.policies(phase) if policy.active), default=None)

    @property
    def decoding(self) -> SelectionPolicy:
        """A decode policy whose gate is the step's, as all have one gate; stock DSA where no layer has another."""
        return next((policy for policy in self.policies("decode") if policy.active), STOCK)

    @property
    def sketch(self) -> int | None:
        """Bits of the page sketches that decode reads, in any layer."""
        return max((policy.sketch for policy in self.policies("decode") if policy.sketch), default=None)

    def on_kernels(self, device: str) -> bool:
        """Whether GPU kernels select on `device` ("cuda", "cpu", …), not the PyTorch reference."""
        return device == "cuda" and self.backend != "torch"

    @property
    def active(self) -> bool:
        """Whether any phase differs from stock DSA."""
        return any(self.gate(phase) is not None for phase in PHASES)

    def unread(self, *, alone: bool, context: int | None = None) -> tuple[str, ...]:
        """Settings that have no effect beside the others, as `prefill.router=peak` with all heads.

        alone: whether a rank has no other that selects for the same requests; context: tokens of a request at most, if
        known: a policy whose gate no request passes has no effect.
        """
        both = ((phase, self.policy(phase)) for phase in PHASES)
        found = [f"{phase}.{name}={getattr(policy, name)}" for phase, policy in both for name in policy.unread]
        for phase in PHASES:
            gate = self.gate(phase)
            if gate is not None and context is not None and gate >= context:
                found.append(f"{phase}.min_len={gate} (no request of {context} tokens passes it)")
        if not self.active:
            looks = {"audit.rows": self.audit.rows, "verify_ranks": self.verify_ranks}
            found += [f"{name}={value}" for name, value in looks.items() if value]
        elif self.verify_ranks and alone:
            found.append(f"verify_ranks={self.verify_ranks} (one rank)")
        return tuple(found)

    def check(self, *, index_heads: int | None = None, topk: int | None = None) -> None:
        """Raise ConfigError naming every impossible combination, with the model's H and k where they are known."""
        ConfigError.raise_if(self._problems(index_heads, topk))

    def _problems(self, index_heads: int | None, topk: int | None) -> Iterator[str]:
        for phase in PHASES:
            yield from self.policy(phase).problems(phase, index_heads=index_heads, topk=topk)
        if self.layers is not None:
            yield from self.layers.problems()
            if self.prefill.active or self.decode.active:
                yield "layers: expected no policy of a phase beside the policies of layers, got both; drop one"
        if (size := len(self.to_json().encode())) > MOST_BYTES:
            yield (
                f"{ENV}: expected at most {MOST_BYTES} bytes of settings, which go to SGLang's processes in it, got "
                f"{size}; shorten the policy file, which can do without recall and long texts"
            )
        yield from self._without_effect()
        if self.verify_stats != "off" and not any(policy.active for policy in self.policies("decode")):
            yield (
                "verify_stats: expected a decode policy with it, as only decode keeps statistics from step to step, "
                f"got decode=dsa and verify_stats={self.verify_stats}; choose one, or drop --misa-verify-stats"
            )

    def _without_effect(self) -> Iterator[str]:
        """Sentences for settings of an audit or a dump that is off."""
        for part, is_on, switch in (
            ("audit", self.audit.rows > 0, "--misa-audit-rows"),
            ("dump", self.dump.folder is not None, "--misa-dump"),
        ):
            settings = getattr(self, part)
            for name, info in type(settings).model_fields.items():
                if not is_on and (value := getattr(settings, name)) != info.default:
                    yield f"{part}.{name}: expected {switch} with it, got {value} without; add {switch}, or drop it"

    def to_json(self) -> str:
        """What `from_json` reads, as short as can be."""
        return self.model_dump_json(exclude_defaults=True)

    @classmethod
    def from_mapping(cls, data: Any, source: str, flags: Mapping[str, str] | None = None) -> MisaConfig:
        """Validate `data` (parsed JSON); `source` and `flags` as for `validated`. Raises ConfigError."""
        config = validated(cls, data, source, flags)
        config.check()
        return config

    @classmethod
    def from_json(cls, text: str, source: str) -> MisaConfig:
        """Parse one JSON object. A preset's name is accepted too, as a word or a JSON string. Raises ConfigError."""
        word = text.strip().strip('"')
        if word in PRESETS:
            return PRESETS[word]
        found = parsed(text, source, f"one JSON object or one of {', '.join(PRESETS)}")
        if PolicyFile.is_meant(found):
            raise ConfigError([f"{source}: expected a configuration, got a policy file; give it with --misa-policy"])
        return cls.from_mapping(found, source)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> MisaConfig | None:
        """The configuration in SGLANG_MISA_CONFIG, or None when the variable is unset or empty: off."""
        text = environ.get(ENV, "")
        return cls.from_json(text, ENV) if text.strip() else None


SKETCH_GATE = {"min_len": 16384, "min_rows": 4, "min_tokens": 450_000}
HISA_DECODE = SelectionPolicy(blocks=64, block_size=128, min_len=32768)


def _ours(heads: int, **axes: Any) -> SelectionPolicy:
    """The heads that one column for all the others would get most wrong, and that column."""
    return SelectionPolicy(heads=heads, router="error", residual=True, **axes)


def _pooled(**axes: Any) -> SelectionPolicy:
    """Routed over blocks of 512; the end of a prompt, which is what it asks, by all heads."""
    return _ours(3, block_size=512, tail=32, **axes)


def _sketched(bits: Literal[1, 2]) -> SelectionPolicy:
    return _ours(7, sketch=bits, candidates=8192, block_size=PAGE, **SKETCH_GATE)


# Each gate is that from which on the kernels are faster than stock (docs/kernel-notes.md).
PRESETS: dict[str, MisaConfig] = {
    "dsa": MisaConfig(),
    # As published: MISA and MISA† (arXiv 2605.07363), HISA (arXiv 2603.28458), and the best of both in its phase.
    "misa": MisaConfig(prefill=SelectionPolicy(heads=8)),
    "misa-hier": MisaConfig(prefill=SelectionPolicy(heads=8, candidates=8192, min_len=32768)),
    "hisa": MisaConfig(prefill=SelectionPolicy(blocks=64, block_size=128, min_len=24576), decode=HISA_DECODE),
    "misa-hisa": MisaConfig(prefill=SelectionPolicy(heads=8), decode=HISA_DECODE),
    # Ours (docs/quality.md).
    "fast": MisaConfig(prefill=_pooled(), decode=_sketched(1)),
    "faithful": MisaConfig(prefill=_pooled(candidates=3072, min_len=16384), decode=_sketched(2)),
    "exact": MisaConfig(prefill=SelectionPolicy(exact=True, min_len=16384)),
}
DEFAULT_PRESET = "faithful"


def preset_name(config: MisaConfig) -> str | None:
    """The name of the preset whose policies `config` has, whatever its audit is; None without one."""
    policies = None if config.layers else (config.prefill, config.decode)
    return next((name for name, preset in PRESETS.items() if (preset.prefill, preset.decode) == policies), None)
