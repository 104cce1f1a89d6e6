"""`--misa-*` flags of the launcher: one for each field of `MisaConfig`, and those that name a starting point."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sglang_misa.config import (
    DEFAULT_PRESET,
    PHASES,
    PRESETS,
    Audit,
    ConfigError,
    Dump,
    MisaConfig,
    SelectionPolicy,
)
from sglang_misa.policy import ALIASES, ONLY, Phase, rest_of_gate
from sglang_misa.policy_file import PolicyFile
from sglang_misa.validation import read_text, short, suggest

DASHES = "-\N{EN DASH}\N{EM DASH}\N{MINUS SIGN}"  # also those that a text editor makes of two
SWITCH = {"on": True, "off": False}
NONE_WORDS = {"heads": "all", "blocks": "all", "sketch": "none", "candidates": "none", "layers": "all"}
NAMES: dict[tuple[str, ...], str] = {("audit", "floor"): "--misa-recall-floor", ("dump", "folder"): "--misa-dump"}


def _numbers(word: str) -> list[int]:
    return [int(number) for number in word.split(",")]


class _Kind(NamedTuple):
    """How a word becomes a value, and what the help and the mistakes call it."""

    parse: Callable[[str], Any]
    metavar: str
    expected: str


KINDS = {
    int: _Kind(int, "N", "a whole number"),
    float: _Kind(float, "X", "a number"),
    str: _Kind(str, "DIR", "a folder"),
    tuple: _Kind(_numbers, "N,N", "whole numbers with commas"),
}


class Flag(NamedTuple):
    """One `--misa-*` flag: the path of its field in the JSON, how a word becomes a value, and its help."""

    name: str
    path: tuple[str, ...]
    none_word: str | None
    choices: tuple[str, ...] | None
    kind: _Kind
    help: str


def every() -> list[Flag]:
    """The flag of each field of MisaConfig, in its order."""
    groups: list[tuple[tuple[str, ...], type[BaseModel]]] = [((p,), SelectionPolicy) for p in PHASES]
    groups += [(("audit",), Audit), (("dump",), Dump), ((), MisaConfig)]
    fields = [((*prefix, name), info) for prefix, model in groups for name, info in model.model_fields.items()]
    return [flag for path, info in fields if (flag := _flag(path, info)) is not None]


def _flag(path: tuple[str, ...], info: FieldInfo) -> Flag | None:
    """The flag of the field at `path`; None for an object of fields, and for what only the other phase has."""
    field, options = path[-1], get_args(info.annotation)
    kinds = {get_origin(kind) or kind for kind in (info.annotation, *options)}
    if any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in kinds):
        return None
    if ONLY.get(field, path[0]) != path[0]:
        return None
    words: tuple[str, ...] | None = tuple(SWITCH) if info.annotation is bool else None
    if options and all(isinstance(option, str) for option in options):
        words = options
    kind = KINDS[str] if words else next((KINDS[kind] for kind in (float, str, tuple) if kind in kinds), KINDS[int])
    name = NAMES.get(path) or "--misa-" + "-".join(path).replace("_", "-")
    return Flag(name, path, NONE_WORDS.get(field), words, kind, info.description or "")


def add_cli_flags(parser: argparse.ArgumentParser) -> None:
    """Add to `parser` what names a starting point, and one flag for each field of MisaConfig."""
    group = parser.add_argument_group("token selection (sglang-misa)")
    group.add_argument(
        "--misa-preset",
        choices=[*PRESETS],
        help=f"start from this preset, which further flags change (default: {DEFAULT_PRESET}, with flags alone)",
    )
    group.add_argument(
        "--misa-config",
        metavar="FILE",
        help="start from a JSON file shaped like SGLANG_MISA_CONFIG; a phase that it leaves out is stock DSA's",
    )
    group.add_argument(
        "--misa-policy", metavar="FILE", help="a policy for each layer, as python -m sglang_misa.calibrate writes it"
    )
    for phase in PHASES:
        group.add_argument(
            _phase_flag(phase),
            choices=[*PRESETS],
            help=f"take {phase} from another preset; dsa leaves it to stock DSA",
        )
    for flag in every():
        metavar = flag.kind.metavar + (f"|{flag.none_word}" if flag.none_word else "")
        old = ALIASES.get(flag.path[-1], {})
        group.add_argument(
            flag.name,
            dest=flag.name,
            nargs="?" if flag.choices == tuple(SWITCH) else None,
            const="on" if flag.choices == tuple(SWITCH) else None,
            choices=flag.choices and [*flag.choices, *old],
            metavar="{" + ",".join(flag.choices) + "}" if flag.choices else metavar,
            help=flag.help,
        )


def flag_names() -> list[str]:
    """Every flag this package owns."""
    return ["--misa-preset", "--misa-config", "--misa-policy", *map(_phase_flag, PHASES), *(f.name for f in every())]


def _phase_flag(phase: Phase) -> str:
    return f"--misa-{phase}"


def from_flags(arguments: argparse.Namespace) -> MisaConfig | None:
    """The configuration named by parsed flags (see `add_cli_flags`); None when no `--misa-*` flag was given: off.

    Raises ConfigError for a value of the wrong type, an unreadable file or an impossible combination.
    """
    given = {name: word for name, word in vars(arguments).items() if word is not None}
    chosen = [(flag, given[flag.name]) for flag in every() if flag.name in given]
    starts = [name for name in ("misa_preset", "misa_config", "misa_policy") if name in given]
    phases: dict[Phase, str] = {phase: given[f"misa_{phase}"] for phase in PHASES if f"misa_{phase}" in given}
    if not chosen and not starts and not phases:
        return None
    if len(starts) > 1:
        names = " and ".join("--" + name.replace("_", "-") for name in starts)
        raise ConfigError([f"expected one starting point, got {names}; drop one"])
    if "misa_policy" in given:
        beside = [*map(_phase_flag, phases), *(flag.name for flag, _ in chosen if flag.path[0] in PHASES)]
        if beside:
            raise ConfigError(
                [f"{beside[0]}: expected none beside --misa-policy, whose file has all policies; drop one"]
            )
    base = _base(given)
    base = base.model_copy(update={phase: PRESETS[preset].policy(phase) for phase, preset in phases.items()})
    data, problems = base.model_dump(), []
    if any(base.decode is preset.decode for preset in PRESETS.values()):  # and not a file's
        data["decode"] |= rest_of_gate([flag.path[-1] for flag, _ in chosen if flag.path[0] == "decode"])
    for flag, word in chosen:
        try:
            value = None if word == flag.none_word else flag.kind.parse(word)
            if flag.choices == tuple(SWITCH):
                value = SWITCH[word]
        except ValueError:
            expected = flag.kind.expected + (f" or '{flag.none_word}'" if flag.none_word else "")
            problems.append(f"{flag.name}: expected {expected}, got {short(word)}; correct it")
            continue
        target = data
        for key in flag.path[:-1]:
            target = target[key]
        target[flag.path[-1]] = value
    ConfigError.raise_if(problems)
    return MisaConfig.from_mapping(data, "flags", {".".join(flag.path): flag.name for flag in every()})


def _base(given: Mapping[str, Any]) -> MisaConfig:
    """What the flags that are `given` start from. Raises ConfigError."""
    if "misa_config" in given:
        path = given["misa_config"]
        return MisaConfig.from_json(read_text("--misa-config", path), path)
    if "misa_policy" in given:
        return MisaConfig(layers=PolicyFile.read(given["misa_policy"]))
    return PRESETS[given.get("misa_preset", DEFAULT_PRESET)]


def reject_unknown_flags(words: Sequence[str]) -> None:
    """Raise ConfigError when `words` hold a flag that means one of ours and is none, naming the closest that is.

    Such as `--misa-…` misspelt, in capitals, or behind one dash or a long one: SGLang might take it for something else.
    """
    problems = []
    for word in words:
        name = word.split("=", 1)[0]
        bare = name.lstrip(DASHES)
        if bare != name and bare.lower().startswith("misa") and name not in flag_names():
            meant = suggest("--" + bare.lower().replace("_", "-"), flag_names())
            problems.append(f"unknown flag {name}{meant}; see --help")
    ConfigError.raise_if(problems)
