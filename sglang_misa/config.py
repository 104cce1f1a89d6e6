"""What the user chooses: one `SelectionPolicy` for prefill, one for decode, and the few settings around them.

The same `MisaConfig` is written as `--misa-*` flags of the launcher, as one JSON object in SGLANG_MISA_CONFIG
(the launcher's children and plain `sglang serve` read that), or as a JSON file named by `--misa-config`.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sglang_misa.kernels.layout import PAGE

ENV = "SGLANG_MISA_CONFIG"

Router = Literal["abs", "signed", "weight"]
Backend = Literal["auto", "triton", "torch"]
Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")


class ConfigError(ValueError):
    """A setting that cannot be used. `problems` holds one sentence each: expected, got, what to do."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        super().__init__("sglang-misa cannot use this configuration:\n" + "\n".join(f"  - {p}" for p in self.problems))


class SelectionPolicy(BaseModel):
    """How the top-k tokens of one phase are found: which tokens, which heads, which finish (DSA is none of them)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    heads: int | None = Field(
        None, ge=1, description="index heads h routed per query on the block means; 'all' scores with every head"
    )
    router: Router = Field(
        "abs",
        description="router statistic over blocks: abs = mean of |w·ReLU(q·k̃)| (the MISA paper), "
        "signed = mean of w·ReLU(q·k̃), weight = |w| alone",
    )
    blocks: int | None = Field(
        None, ge=2, description="token blocks kept per query, first and newest included; 'all' prunes none"
    )
    candidates: int | None = Field(
        None,
        ge=1,
        description="tokens C kept by the cheap score and scored again with all heads; 'none' takes top-k at once",
    )
    block_size: int = Field(256, ge=PAGE, multiple_of=PAGE, description="tokens in a block, a multiple of 64")
    min_len: int = Field(
        8192,
        ge=0,
        description="a prefill query that sees fewer tokens than this, and a decode step whose longest request has "
        "fewer, get stock DSA",
    )

    @property
    def name(self) -> str:
        """The method's name in the literature, of the axes in use."""
        if self.heads is None and self.blocks is None:
            return "dsa"
        head, block = self.heads is not None, self.blocks is not None
        base = "misa-hisa" if head and block else "misa" if head else "hisa"
        return base + ("-hier" if self.candidates is not None else "")

    @property
    def active(self) -> bool:
        """Whether this policy differs from stock DSA at all (a re-ranking of all-head scores changes nothing)."""
        return self.heads is not None or self.blocks is not None

    def problems(self, phase: Phase, *, index_heads: int | None = None, topk: int | None = None) -> Iterator[str]:
        """Sentences for what is impossible in this policy, alone or with a model's `index_heads` H and `topk` k."""
        flag = f"--misa-{phase}"
        if self.candidates is not None and not self.active:
            yield (
                f"{phase}.candidates: expected a policy that leaves heads or tokens out, got candidates="
                f"{self.candidates} with all heads and all tokens; set {flag}-heads or {flag}-blocks, or drop it"
            )
        kept = None if self.blocks is None else self.blocks * self.block_size
        if kept is not None and self.candidates is not None and kept < self.candidates:
            yield (
                f"{phase}.candidates: expected at most blocks × block_size = {kept} tokens, got {self.candidates}; "
                f"raise {flag}-blocks or lower {flag}-candidates"
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


class Audit(BaseModel):
    """Recall of live selections against the dense indexer, and what happens when it sinks."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    rows: int = Field(0, ge=0, description="query rows checked against all heads in each audited prefill call; 0 = off")
    every: int = Field(64, ge=1, description="audit one prefill call of a layer in this many")
    floor: float = Field(0.0, ge=0.0, le=1.0, description="mean recall of a layer under which `action` is taken")
    action: Literal["log", "dense"] = Field(
        "log", description="under the floor: log = warn, dense = give that layer back to stock DSA until restart"
    )


class MisaConfig(BaseModel):
    """Everything sglang-misa reads. Build one with `from_json`, `from_flags` or `PRESETS[name]`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    prefill: SelectionPolicy = SelectionPolicy()
    decode: SelectionPolicy = SelectionPolicy()
    audit: Audit = Audit()
    backend: Backend = Field(
        "auto",
        description="auto = Triton/CUDA kernels on a GPU they support and PyTorch elsewhere; torch = the reference",
    )

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
        if problems:
            raise ConfigError(problems)

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
        except json.JSONDecodeError as error:
            raise ConfigError(
                [f"{source}: expected one JSON object or one of {', '.join(PRESETS)}, got {_short(text)} ({error})"]
            ) from None
        return cls.from_mapping(data, source)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> MisaConfig | None:
        """The configuration in SGLANG_MISA_CONFIG, or None when the variable is unset or empty: off."""
        text = environ.get(ENV, "")
        return cls.from_json(text, ENV) if text.strip() else None


# Pruning blocks in decode is 1.2 to 2.6 times as fast as stock at 32K for 1 to 128 requests on an H100, and no slower
# beyond; at 16K it is 0.8 times for 1 and 4 requests, and ahead from 16 on (the table is in
# kernels/decode/topk_blocks.py). One gate serves all batches, so it stands where none loses.
DECODE = SelectionPolicy(blocks=64, block_size=128, min_len=32768)

# Prefill's length gates stand where the kernels have overtaken stock on an H100 at H = 64 (bench/results): queries that
# see up to 8K tokens gain 1.6 to 2 times by misa, 24K to 32K 2.1 times by hisa and 1.6 times by misa-hier (1.6 and 1.1
# times at H = 32, where both lose up to 16K).
PRESETS: dict[str, MisaConfig] = {
    "dsa": MisaConfig(),
    "misa": MisaConfig(prefill=SelectionPolicy(heads=8)),
    "misa-hier": MisaConfig(prefill=SelectionPolicy(heads=8, candidates=8192, min_len=32768)),
    "hisa": MisaConfig(
        prefill=SelectionPolicy(blocks=64, block_size=128, min_len=24576),
        decode=DECODE,
    ),
    # Each phase cuts what binds it: prefill the tensor cores' heads, decode the bytes of the keys it reads.
    "misa-hisa": MisaConfig(prefill=SelectionPolicy(heads=8), decode=DECODE),
}


class _Flag(NamedTuple):
    """One `--misa-*` flag: the path of its field in the JSON, how a word becomes a value, and its help."""

    name: str
    path: tuple[str, ...]
    none_word: str | None
    choices: tuple[str, ...] | None
    kind: type
    help: str


def _flags() -> list[_Flag]:
    none_words = {"heads": "all", "blocks": "all", "candidates": "none"}
    groups: list[tuple[tuple[str, ...], type[BaseModel]]] = [((p,), SelectionPolicy) for p in PHASES]
    groups += [(("audit",), Audit), ((), MisaConfig)]
    flags = []
    for prefix, model in groups:
        for field, info in model.model_fields.items():
            if model is MisaConfig and field != "backend":
                continue
            choices = getattr(info.annotation, "__args__", None)
            words = tuple(choices) if choices and all(isinstance(c, str) for c in choices) else None
            kind = str if words else float if info.annotation is float else int
            path = (*prefix, field)
            name = "--misa-" + "-".join(path).replace("_", "-")
            flags.append(_Flag(name, path, none_words.get(field), words, kind, info.description or ""))
    return flags


def add_cli_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--misa-preset`, `--misa-config` and one flag for each field of MisaConfig to `parser`."""
    group = parser.add_argument_group("token selection (sglang-misa)")
    group.add_argument(
        "--misa-preset", choices=[*PRESETS], help="start from a named method; further flags change it (default: misa)"
    )
    group.add_argument("--misa-config", metavar="FILE", help="start from a JSON file shaped like SGLANG_MISA_CONFIG")
    for flag in _flags():
        metavar = (
            None
            if flag.choices
            else ("N" if flag.kind is int else "X") + (f"|{flag.none_word}" if flag.none_word else "")
        )
        group.add_argument(flag.name, dest=flag.name, choices=flag.choices, metavar=metavar, help=flag.help)


def flag_names() -> list[str]:
    """Every flag this package owns."""
    return ["--misa-preset", "--misa-config", *(f.name for f in _flags())]


def from_flags(arguments: argparse.Namespace) -> MisaConfig | None:
    """The configuration named by parsed flags (see `add_cli_flags`); None when no `--misa-*` flag was given: off.

    Raises ConfigError for a value of the wrong type, an unreadable file or an impossible combination.
    """
    given = vars(arguments)
    chosen = [(flag, given[flag.name]) for flag in _flags() if given.get(flag.name) is not None]
    if not chosen and given.get("misa_preset") is None and given.get("misa_config") is None:
        return None
    if given.get("misa_preset") is not None and given.get("misa_config") is not None:
        raise ConfigError(["expected one starting point, got both --misa-preset and --misa-config; drop one"])
    if given.get("misa_config") is not None:
        base = _read_file(given["misa_config"])
    else:
        base = PRESETS[given.get("misa_preset") or "misa"]
    data = base.model_dump()
    problems = []
    for flag, word in chosen:
        try:
            value = None if word == flag.none_word else flag.kind(word)
        except ValueError:
            expected = ("a whole number" if flag.kind is int else "a number") + (
                f" or '{flag.none_word}'" if flag.none_word else ""
            )
            problems.append(f"{flag.name}: expected {expected}, got {word!r}")
            continue
        target = data
        for key in flag.path[:-1]:
            target = target[key]
        target[flag.path[-1]] = value
    if problems:
        raise ConfigError(problems)
    return MisaConfig.from_mapping(data, "flags")


def reject_unknown_flags(words: Sequence[str]) -> None:
    """Raise ConfigError when `words` hold a `--misa-*` flag that does not exist, naming the closest that does."""
    problems = []
    for word in words:
        name = word.split("=", 1)[0]
        if name.startswith("--misa") and name not in flag_names():
            problems.append(f"unknown flag {name}{_suggest(name, flag_names())}; see --help")
    if problems:
        raise ConfigError(problems)


def _read_file(path: str) -> MisaConfig:
    try:
        with open(path, encoding="utf-8") as file:
            return MisaConfig.from_json(file.read(), path)
    except OSError as error:
        raise ConfigError([f"--misa-config: expected a readable JSON file, got {path} ({error.strerror})"]) from None


def _sentence(error: Any) -> str:
    """One pydantic error as: field, expected, got, and the closest known name where the name is the mistake."""
    where = ".".join(str(part) for part in error["loc"]) or "the object"
    if error["type"] == "extra_forbidden":
        parents: dict[str, type[BaseModel]] = {"prefill": SelectionPolicy, "decode": SelectionPolicy, "audit": Audit}
        model = parents.get(str(error["loc"][0]), MisaConfig) if len(error["loc"]) > 1 else MisaConfig
        known = list(model.model_fields)
        return f"{where}: unknown name{_suggest(str(error['loc'][-1]), known)}; known are {', '.join(known)}"
    return f"{where}: {error['msg'].replace('Input should be', 'expected')}, got {_short(error.get('input'))}"


def _suggest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
