"""`--misa-*` flags of the launcher: one for each field of `MisaConfig`, and two that name a starting point."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

from pydantic import BaseModel

from sglang_misa.config import (
    ALIASES,
    DEFAULT_PRESET,
    PHASES,
    PRESETS,
    Audit,
    ConfigError,
    MisaConfig,
    SelectionPolicy,
    suggest,
)

SWITCH = {"on": True, "off": False}


class _Flag(NamedTuple):
    """One `--misa-*` flag: the path of its field in the JSON, how a word becomes a value, and its help."""

    name: str
    path: tuple[str, ...]
    none_word: str | None
    choices: tuple[str, ...] | None
    kind: type
    help: str


def _flags() -> list[_Flag]:
    none_words = {"heads": "all", "blocks": "all", "sketch": "none", "candidates": "none"}
    groups: list[tuple[tuple[str, ...], type[BaseModel]]] = [((p,), SelectionPolicy) for p in PHASES]
    groups += [(("audit",), Audit), ((), MisaConfig)]
    flags = []
    for prefix, model in groups:
        for field, info in model.model_fields.items():
            if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
                continue
            choices = getattr(info.annotation, "__args__", None)
            words = tuple(choices) if choices and all(isinstance(c, str) for c in choices) else None
            if info.annotation is bool:
                words = tuple(SWITCH)
            kind = str if words else float if info.annotation is float else int
            path = (*prefix, field)
            name = "--misa-" + "-".join(path).replace("_", "-")
            flags.append(_Flag(name, path, none_words.get(field), words, kind, info.description or ""))
    return flags


def add_cli_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--misa-preset`, `--misa-config` and one flag for each field of MisaConfig to `parser`."""
    group = parser.add_argument_group("token selection (sglang-misa)")
    group.add_argument(
        "--misa-preset",
        choices=[*PRESETS],
        help=f"start from a named method; further flags change it (default: {DEFAULT_PRESET})",
    )
    group.add_argument("--misa-config", metavar="FILE", help="start from a JSON file shaped like SGLANG_MISA_CONFIG")
    for flag in _flags():
        metavar = (
            None
            if flag.choices
            else ("N" if flag.kind is int else "X") + (f"|{flag.none_word}" if flag.none_word else "")
        )
        old = ALIASES.get(flag.path[-1], {})
        group.add_argument(
            flag.name,
            dest=flag.name,
            nargs="?" if flag.choices == tuple(SWITCH) else None,
            const="on" if flag.choices == tuple(SWITCH) else None,
            choices=flag.choices and [*flag.choices, *old],
            metavar=metavar or (flag.choices and "{" + ",".join(flag.choices) + "}"),
            help=flag.help,
        )


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
        base = PRESETS[given.get("misa_preset") or DEFAULT_PRESET]
    data = base.model_dump()
    problems = []
    for flag, word in chosen:
        try:
            value = None if word == flag.none_word else flag.kind(word)
            if flag.choices == tuple(SWITCH):
                value = SWITCH[word]
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
    ConfigError.raise_if(problems)
    return MisaConfig.from_mapping(data, "flags")


def reject_unknown_flags(words: Sequence[str]) -> None:
    """Raise ConfigError when `words` hold a `--misa-*` flag that does not exist, naming the closest that does."""
    problems = []
    for word in words:
        name = word.split("=", 1)[0]
        if name.startswith("--misa") and name not in flag_names():
            problems.append(f"unknown flag {name}{suggest(name, flag_names())}; see --help")
    ConfigError.raise_if(problems)


def _read_file(path: str) -> MisaConfig:
    try:
        with open(path, encoding="utf-8-sig") as file:
            return MisaConfig.from_json(file.read(), path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"--misa-config: expected a readable JSON file, got {path} ({error})"]) from None
