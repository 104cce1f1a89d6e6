"""How the tokens of one phase are found: a `SelectionPolicy`, and what is impossible in one."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from sglang_misa.kernels.layout import PAGE, Router

logger = logging.getLogger(__name__)

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
ONLY: Mapping[str, Phase] = {
    "sketch": "decode",
    "min_rows": "decode",
    "min_tokens": "decode",
    "tail": "prefill",
    "exact": "prefill",
}  # fields of one phase
MOST = (1 << 31) - 1  # of any count: kernels and tensors index with int32
ALIASES = {"router": {"abs": "mean"}, "backend": {"triton": "kernels"}}  # words of earlier releases


def renamed(field: str, word: object) -> object:
    """`word`, or the one that replaced it since an earlier release, which the log then says."""
    new = ALIASES[field].get(word) if isinstance(word, str) else None
    if new is None:
        return word
    logger.warning("%s: %r is called %r now; both are understood", field, word, new)
    return new


def rest_of_gate(given: Collection[str]) -> dict[str, int]:
    """What takes the place of a preset's gate of decode, beside the fields that are `given`.

    A gate that is given in part is a gate of one's own: the preset's `min_tokens` was measured with its other fields.
    """
    whole = "min_tokens" in given or {"min_len", "min_rows"}.isdisjoint(given)
    return {} if whole else {"min_tokens": STOCK.min_tokens}


class SelectionPolicy(BaseModel):
    """How the top-k tokens of one phase are found: which tokens, heads and keys, and which finish."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    heads: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="index heads that score each query, chosen by the router; 'all' disables routing",
    )
    router: Router = Field(
        "mean",
        description="router statistic over blocks: mean of |w·ReLU(q·k̃)| (the MISA paper), peak = its maximum, "
        "signed = mean of w·ReLU(q·k̃), weight = |w| alone, error = |w| times what a residual gets wrong of the head",
    )
    residual: bool = Field(False, description="add one linear column that approximates the heads that are not routed")
    blocks: int | None = Field(
        None,
        ge=2,
        le=MOST,
        description="token blocks kept for each query, ranked by their mean keys, always with the first and the "
        "newest; 'all' keeps every block",
    )
    sketch: Literal[1, 2] | None = Field(
        None, description="scan sketches of 1 or 2 bits a coordinate instead of the keys; needs candidates"
    )
    candidates: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="tokens kept by the cheap score and scored again with all heads; 'none' takes the top k by the "
        "cheap score",
    )
    exact: bool = Field(
        False, description="score with all heads and select exactly with this package's kernels, without a score matrix"
    )
    block_size: int = Field(
        256,
        ge=PAGE,
        le=MOST,
        multiple_of=PAGE,
        description="tokens in a block of the router or of HISA, a multiple of 64",
    )
    min_len: int = Field(
        8192,
        ge=0,
        le=MOST,
        description="leave contexts of up to this many tokens to stock DSA: in prefill by query, in decode by the "
        "longest request of the step",
    )
    min_rows: int = Field(
        1, ge=1, le=MOST, description="leave steps of fewer rows (requests times verified tokens) to stock DSA"
    )
    min_tokens: int = Field(
        0,
        ge=0,
        le=MOST,
        description="leave steps to stock DSA whose rows together see fewer tokens than this beyond min_len for each "
        "row; with 0 the longest request decides; where a preset's min_len or min_rows is changed and this is not, it "
        "is 0",
    )
    tail: int = Field(
        0,
        ge=0,
        le=MOST,
        description="score this many queries at the end of each prompt, by which an answer begins, with all heads",
    )

    @field_validator("router", mode="before")
    @classmethod
    def _renamed_router(cls, word: object) -> object:
        return renamed("router", word)

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
    def label(self) -> str:
        """The name, and the sizes that tell policies of one name apart."""
        sizes = {"h": self.heads, "blocks": self.blocks, "C": self.candidates}
        told = [f"{size}={value}" for size, value in sizes.items() if value is not None]
        return f"{self.name} ({', '.join([*told, f'block={self.block_size}'])})" if self.pooled else self.name

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

    @property
    def unread(self) -> tuple[str, ...]:
        """Fields that have a value of their own and no effect: a router of no heads, a gate before stock DSA."""
        read = {
            "router": self.heads is not None,
            "block_size": self.pooled,
            "tail": self.active and not self.exact,
            **dict.fromkeys(("min_len", "min_rows", "min_tokens"), self.active),
        }
        fields = type(self).model_fields.items()
        return tuple(name for name, info in fields if not read.get(name, True) and getattr(self, name) != info.default)

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
                yield f"{phase}.exact: expected all heads, tokens and keys, got {', '.join(others)}; drop either"
            if phase == "decode":
                yield "decode.exact: expected off, as there is no score matrix to save, got on; drop it"
        if self.residual and self.heads is None:
            yield (
                f"{phase}.residual: expected routed heads with it, as all heads leave none over, got heads=all; set "
                f"{flag}-heads, or drop {flag}-residual"
            )
        if self.router == "error" and self.heads is not None and not self.residual:
            yield (
                f"{phase}.router: expected a residual with error, which ranks heads by what that would get wrong, got "
                f"none; set {flag}-residual, or choose another {flag}-router"
            )
        for name, none in (("min_rows", 1), ("min_tokens", 0)):
            if phase == "prefill" and (value := getattr(self, name)) > none:
                yield f"prefill.{name}: expected {none}, as only decode has it, got {value}; drop it"
        if self.tail and phase == "decode":
            yield f"decode.tail: expected 0, as only prefill has the end of a prompt, got {self.tail}; drop it"
        if self.sketch is not None and phase == "prefill":
            yield f"prefill.sketch: expected none, as prefill reads a key for many rows, got {self.sketch}; drop it"
        if self.sketch is not None and self.candidates is None:
            yield (
                f"{phase}.sketch: expected candidates to score on the stored keys, got none; set {flag}-candidates "
                "(8192 keeps 0.96 of DSA's tokens with 1 bit and 0.998 with 2 on a trained indexer at 128K)"
            )
        if self.candidates is not None and not self.active:
            bits = f", {flag}-blocks or {flag}-sketch" if phase == "decode" else f" or {flag}-blocks"
            yield (
                f"{phase}.candidates: expected a policy that leaves heads, tokens or bits out, got candidates="
                f"{self.candidates} with all of them; set {flag}-heads{bits}, or drop it"
            )


STOCK = SelectionPolicy()
# DSA's own tokens, selected by this package's kernels: for rows of a call that its policy does not take.
EXACT = SelectionPolicy(exact=True)
