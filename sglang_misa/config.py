"""What the user chooses: one `SelectionPolicy` for prefill, one for decode, and the few settings around them.

The same `MisaConfig` is written as one JSON object in SGLANG_MISA_CONFIG (the launcher's children and plain `sglang
serve` read that), as a JSON file, or as `--misa-*` flags of the launcher (`flags.py`).
"""

from __future__ import annotations

import difflib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from sglang_misa.kernels.layout import PAGE
from sglang_misa.refusal import Refusal

logger = logging.getLogger(__name__)

ENV = "SGLANG_MISA_CONFIG"

Router = Literal["mean", "peak", "signed", "weight"]
Backend = Literal["auto", "kernels", "torch"]
VerifyStats = Literal["off", "log", "raise"]
ALIASES = {"router": {"abs": "mean"}, "backend": {"triton": "kernels"}}  # words of earlier releases
Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")


class ConfigError(Refusal, ValueError):
    """A setting that cannot be used."""

    opening = "sglang-misa cannot use this configuration"


def _renamed(field: str, word: object) -> object:
    """`word`, or the one that replaced it since an earlier release, which the log then says."""
    new = ALIASES[field].get(word) if isinstance(word, str) else None
    if new is None:
        return word
    logger.warning("%s: %r is called %r now; both are understood", field, word, new)
    return new


class SelectionPolicy(BaseModel):
    """How the top-k tokens of one phase are found: which tokens, heads and keys, and which finish."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    heads: int | None = Field(
        None, ge=1, description="index heads h routed per query on the block means; 'all' scores with every head"
    )
    router: Router = Field(
        "mean",
        description="router statistic over blocks: mean of |w·ReLU(q·k̃)| (the MISA paper), peak = its maximum, "
        "signed = mean of w·ReLU(q·k̃), weight = |w| alone",
    )
    residual: bool = Field(
        False, description="score the heads that are not routed too, fused to one linear column: one more than heads"
    )
    blocks: int | None = Field(
        None, ge=2, description="token blocks kept per query, first and newest included; 'all' prunes none"
    )
    sketch: Literal[1, 2] | None = Field(
        None, description="decode: score sketches of b bits a coordinate around the page means instead of the keys"
    )
    candidates: int | None = Field(
        None,
        ge=1,
        description="tokens C kept by the cheap score and scored again with all heads; 'none' takes top-k at once",
    )
    exact: bool = Field(
        False, description="prefill: all heads and tokens, selected exactly by kernels of ours, without a score matrix"
    )
    block_size: int = Field(
        256, ge=PAGE, multiple_of=PAGE, description="tokens in a block of the router or of HISA, a multiple of 64"
    )
    min_len: int = Field(
        8192,
        ge=0,
        description="a prefill query that sees at most so many tokens, and a decode step whose longest request has at "
        "most so many, get stock DSA",
    )

    @field_validator("router", mode="before")
    @classmethod
    def _renamed_router(cls, word: object) -> object:
        return _renamed("router", word)

    @property
    def name(self) -> str:
        """The method's name in the literature, and the axes in use that it has no name for."""
        if not self.active:
            return "dsa"
        if self.exact:
            return "exact"
        base = "+".join(name for name, axis in (("misa", self.heads), ("hisa", self.blocks)) if axis is not None)
        parts = [
            base,
            self.router if self.heads is not None and self.router != "mean" else "",
            "residual" if self.residual else "",
            f"sketch{self.sketch}" if self.sketch else "",
            "hier" if self.candidates is not None and not self.sketch else "",
        ]
        return "-".join(filter(None, parts))

    @property
    def active(self) -> bool:
        """Whether this policy differs from stock DSA at all (a re-ranking of all-head scores changes nothing)."""
        return self.exact or self.heads is not None or self.blocks is not None or self.sketch is not None

    @property
    def columns(self) -> int | None:
        """Scored columns a key: the routed heads and the residual; None for all heads."""
        return None if self.heads is None else self.heads + self.residual

    @property
    def pooled(self) -> bool:
        """Whether this policy reads pooled keys: to route heads or to keep blocks."""
        return self.heads is not None or self.blocks is not None

    def problems(self, phase: Phase, *, index_heads: int | None = None, topk: int | None = None) -> Iterator[str]:
        """Sentences for what is impossible in this policy, alone or with a model's `index_heads` H and `topk` k."""
        flag = f"--misa-{phase}"
        yield from self._alone(phase, flag)
        kept = None if self.blocks is None else self.blocks * self.block_size
        if kept is not None and self.candidates is not None and kept < self.candidates:
            yield (
                f"{phase}.candidates: expected at most blocks × block_size = {kept} tokens, got {self.candidates}; "
                f"raise {flag}-blocks or lower {flag}-candidates"
            )
        if index_heads is not None and self.heads is not None and self.residual and self.heads == index_heads:
            yield (
                f"{phase}.residual: expected fewer routed heads than the model's {index_heads}, as none is left over, "
                f"got {self.heads}; lower {flag}-heads, or drop {flag}-residual"
            )
        if index_heads is not None and self.heads is not None and self.heads > index_heads:
            yield (
                f"{phase}.heads: expected at most the model's {index_heads} index heads, got {self.heads}; "
                f"lower {flag}-heads (8 is the paper's choice)"
            )
        if topk is not None and self.candidates is not None and self.candidates < topk:
            yield (
                f"{phase}.candidates: expected at least the model's index_topk = {topk}, got {self.candidates}; "
                f"raise {flag}-candidates (the released MISA uses 8192)"
            )
        if topk is not None and kept is not None and kept < topk:
            yield (
                f"{phase}.blocks: expected blocks × block_size of at least the model's index_topk = {topk} tokens, got "
                f"{self.blocks} × {self.block_size} = {kept}; raise {flag}-blocks (HISA uses 64 blocks of 128)"
            )

    def _alone(self, phase: Phase, flag: str) -> Iterator[str]:
        """Sentences for axes that contradict each other whatever the model is."""
        if self.exact:
            axes = ("heads", "residual", "blocks", "sketch", "candidates")
            others = [name for name in axes if getattr(self, name) not in (None, False)]
            if others:
                yield (
                    f"{phase}.exact: expected all heads, tokens and keys with it, got {', '.join(others)} too; drop "
                    f"{flag}-exact or the others"
                )
            if phase == "decode":
                yield f"decode.exact: expected prefill, where there is a score matrix to save; drop {flag}-exact"
        if self.residual and self.heads is None:
            yield (
                f"{phase}.residual: expected routed heads with it, as all heads leave none over, got heads=all; set "
                f"{flag}-heads, or drop {flag}-residual"
            )
        if self.sketch is not None and phase == "prefill":
            yield (
                f"prefill.sketch: expected none, as prefill reads a key once for many rows, got {self.sketch}; drop "
                f"{flag}-sketch"
            )
        if self.sketch is not None and self.candidates is None:
            yield (
                f"{phase}.sketch: expected candidates to score on the stored keys, got none; set {flag}-candidates "
                "(8192 keeps 0.96 of DSA's tokens with 1 bit and 0.998 with 2 on a trained indexer at 128K)"
            )
        if self.candidates is not None and not self.active:
            yield (
                f"{phase}.candidates: expected a policy that leaves heads, tokens or bits out, got candidates="
                f"{self.candidates} with all of them; set {flag}-heads, {flag}-blocks or {flag}-sketch, or drop it"
            )


class Audit(BaseModel):
    """Recall of live selections against the dense indexer, and what happens when it sinks."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    rows: int = Field(0, ge=0, description="query rows checked against all heads in each audited call; 0 = off")
    every: int = Field(64, ge=1, description="audit one call of a layer, and one replay of decode graphs, in this many")
    decode_layers: int = Field(8, ge=1, description="in decode graphs, watch one layer in this many")
    floor: float = Field(0.0, ge=0.0, le=1.0, description="mean recall of a layer under which `action` is taken")
    action: Literal["log", "dense"] = Field(
        "log", description="under the floor: log = warn, dense = give that layer back to stock DSA until restart"
    )


class MisaConfig(BaseModel):
    """Everything sglang-misa reads. Build one with `from_json`, `flags.from_flags` or `PRESETS[name]`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    prefill: SelectionPolicy = SelectionPolicy()
    decode: SelectionPolicy = SelectionPolicy()
    audit: Audit = Audit()
    backend: Backend = Field(
        "auto",
        description="auto = kernels (CUDA and Triton) on a GPU and PyTorch elsewhere; torch = the reference",
    )

    verify_stats: VerifyStats = Field(
        "off",
        description="compute a sample of page statistics anew at each step and compare them by bits: log = tell of a "
        "mismatch, raise = stop the server",
    )
    allow_unverified: bool = Field(
        False, description="serve on a GPU with a version of SGLang that this package was verified with on a CPU only"
    )

    @field_validator("backend", mode="before")
    @classmethod
    def _renamed_backend(cls, word: object) -> object:
        return _renamed("backend", word)

    def policy(self, phase: Phase) -> SelectionPolicy:
        return self.prefill if phase == "prefill" else self.decode

    @property
    def active(self) -> bool:
        """Whether any phase differs from stock DSA."""
        return self.prefill.active or self.decode.active

    def check(self, *, index_heads: int | None = None, topk: int | None = None) -> None:
        """Raise ConfigError naming every impossible combination, with the model's H and k where they are known."""
        problems = [
            p for phase in PHASES for p in self.policy(phase).problems(phase, index_heads=index_heads, topk=topk)
        ]
        if self.audit.floor > 0 and self.audit.rows == 0:
            problems.append(
                f"audit.floor: expected audited rows with a floor, got rows=0 and floor={self.audit.floor}; "
                "set --misa-audit-rows, or drop --misa-audit-floor"
            )
        if self.verify_stats != "off" and not self.decode.active:
            problems.append(
                "verify_stats: expected a decode policy with it, as only decode keeps statistics from step to step, "
                f"got decode=dsa and verify_stats={self.verify_stats}; choose one, or drop --misa-verify-stats"
            )
        ConfigError.raise_if(problems)

    def to_json(self) -> str:
        return self.model_dump_json()

    @classmethod
    def from_mapping(cls, data: Any, source: str) -> MisaConfig:
        """Validate `data` (parsed JSON); `source` is named in every problem. Raises ConfigError."""
        try:
            config = cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError([f"{source}: {_sentence(e)}" for e in error.errors()]) from None
        config.check()
        return config

    @classmethod
    def from_json(cls, text: str, source: str) -> MisaConfig:
        """Parse one JSON object. A lone preset name is accepted too. Raises ConfigError."""
        if text.strip() in PRESETS:
            return PRESETS[text.strip()]
        try:
            data = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(
                [f"{source}: expected one JSON object or one of {', '.join(PRESETS)}, got {_short(text)} ({error})"]
            ) from None
        return cls.from_mapping(data, source)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> MisaConfig | None:
        """The configuration in SGLANG_MISA_CONFIG, or None when the variable is unset or empty: off."""
        text = environ.get(ENV, "")
        return cls.from_json(text, ENV) if text.strip() else None


HISA_DECODE = SelectionPolicy(blocks=64, block_size=128, min_len=32768)


def _peak(**axes: Any) -> SelectionPolicy:
    """Ours: seven heads routed by their peak, the others as one column."""
    return SelectionPolicy(heads=7, router="peak", residual=True, **axes)


# Each length gate stands where the kernels have overtaken stock (docs/measured.md); one gate serves all batches.
PRESETS: dict[str, MisaConfig] = {
    "dsa": MisaConfig(),
    # As published: MISA and MISA† (arXiv 2605.07363), HISA (arXiv 2603.28458), and the best of both in its phase.
    "misa": MisaConfig(prefill=SelectionPolicy(heads=8)),
    "misa-hier": MisaConfig(prefill=SelectionPolicy(heads=8, candidates=8192, min_len=32768)),
    "hisa": MisaConfig(prefill=SelectionPolicy(blocks=64, block_size=128, min_len=24576), decode=HISA_DECODE),
    "misa-hisa": MisaConfig(prefill=SelectionPolicy(heads=8), decode=HISA_DECODE),
    # Ours (docs/quality.md). Decode stays stock: sketches keep DSA's tokens, but do not pay yet for few requests.
    "fast": MisaConfig(prefill=_peak(block_size=128)),
    "faithful": MisaConfig(prefill=_peak(candidates=4096, block_size=128, min_len=16384)),
    "exact": MisaConfig(prefill=SelectionPolicy(exact=True, min_len=16384)),
    # Decode over sketches alone: faster than stock for large batches of long requests, slower for few.
    "sketch-1bit": MisaConfig(decode=_peak(sketch=1, candidates=8192, block_size=PAGE, min_len=65536)),
    "sketch-2bit": MisaConfig(decode=_peak(sketch=2, candidates=8192, block_size=PAGE, min_len=65536)),
}
DEFAULT_PRESET = "fast"  # of ours the one that no input has made slower than stock


def preset_name(config: MisaConfig) -> str | None:
    """The name of the preset whose policies `config` has, whatever its audit is; None without one."""
    policies = config.prefill, config.decode
    return next((name for name, preset in PRESETS.items() if (preset.prefill, preset.decode) == policies), None)


def _sentence(error: Any) -> str:
    """One pydantic error as: field, expected, got, and the closest known name where the name is the mistake."""
    where = ".".join(str(part) for part in error["loc"]) or "the object"
    if error["type"] == "extra_forbidden":
        parents: dict[str, type[BaseModel]] = {"prefill": SelectionPolicy, "decode": SelectionPolicy, "audit": Audit}
        model = parents.get(str(error["loc"][0]), MisaConfig) if len(error["loc"]) > 1 else MisaConfig
        known = list(model.model_fields)
        return f"{where}: unknown name{suggest(str(error['loc'][-1]), known)}; known are {', '.join(known)}"
    return f"{where}: {error['msg'].replace('Input should be', 'expected')}, got {_short(error.get('input'))}"


def suggest(name: str, known: Sequence[str]) -> str:
    """ ", did you mean …?" with the closest of `known`, or nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
