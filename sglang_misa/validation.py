"""From parsed JSON to a model of ours: every mistake as a sentence with its field, what was expected and what came."""

from __future__ import annotations

import difflib
import errno
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from sglang_misa.refusal import Refusal

Model = TypeVar("Model", bound=BaseModel)
MOST_BYTES = 16 << 20  # of a file of settings; one without an end would be read until memory is full


class ConfigError(Refusal, ValueError):
    """A setting that cannot be used."""

    opening = "sglang-misa cannot use this configuration"


def validated(model: type[Model], data: Any, source: str, flags: Mapping[str, str] | None = None) -> Model:
    """`data` (parsed JSON) as a `model`. Raises ConfigError.

    Every problem names the field: by its flag where `flags` has one for it, else by `source` and its path.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError([_sentence(each, model, source, flags or {}) for each in error.errors()]) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of `pairs`. Raises ValueError for a name that comes twice, of which JSON would take the last."""
    for name, count in Counter(name for name, _ in pairs).items():
        if count > 1:
            raise ValueError(f"{name!r} comes {count} times")
    return dict(pairs)


def parsed(
    text: str, source: str, expected: str = "one JSON object", pairs: Callable[[list[tuple[str, Any]]], Any] = _once
) -> Any:
    """The JSON value in `text`; pairs: what becomes of an object's. Raises ConfigError."""
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise ConfigError([f"{source}: expected {expected}, got {short(text)} ({error}); correct it"]) from None


def parsed_object(text: str, source: str) -> dict[str, Any]:
    """The JSON object in `text`, of another's making. Raises ConfigError, for JSON of another kind too."""
    found = parsed(text, source, pairs=dict)
    if not isinstance(found, dict):
        raise ConfigError([f"{source}: expected one JSON object, got {short(found)}; correct it"])
    return found


def small_text(path: str | Path) -> str:
    """The text of a file in UTF-8. Raises OSError for one of more than MOST_BYTES, and UnicodeDecodeError."""
    with Path(path).open("rb") as file:
        read = file.read(MOST_BYTES + 1)
    if len(read) > MOST_BYTES:
        raise OSError(errno.EFBIG, f"more than {MOST_BYTES >> 20} MiB")
    return read.decode("utf-8-sig")


def named_file(flag: str, word: str) -> Path:
    """What `flag` names, ~ as the home of a user: a shell expands none after =. Raises ConfigError for ""."""
    if not word:
        raise ConfigError([f"{flag}: expected a path, got an empty name (an unset variable?); name one, or drop it"])
    return Path(os.path.expanduser(word))


def read_text(flag: str, path: str | Path) -> str:
    """The text of a JSON file that `flag` named. Raises ConfigError where it cannot be read."""
    try:
        return small_text(named_file(flag, str(path)))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{flag}: expected a readable JSON file, got {path} ({error}); check it"]) from None


def suggest(name: str, known: Sequence[str]) -> str:
    """ ", did you mean …?" with the closest of `known`, or nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else ""


def short(value: Any) -> str:
    """`value` as Python writes it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def plain(text: str) -> str:
    """`text` of another's making for a terminal: what is not printable ASCII, half a character too, as an escape."""
    return text.encode("unicode_escape").decode()


def _sentence(error: Any, model: type[BaseModel], source: str, flags: Mapping[str, str]) -> str:
    """One pydantic error as: field, expected, got, and the closest known name where the name is the mistake."""
    path = ".".join(str(part) for part in error["loc"]) or "the object"
    where, kind = flags.get(path, f"{source}: {plain(path)}"), error["type"]
    if kind == "extra_forbidden":
        known = list(_model_at(model, error["loc"][:-1]).model_fields)
        return f"{where}: unknown name{suggest(str(error['loc'][-1]), known)}; known are {', '.join(known)}"
    if kind == "missing":
        return f"{where}: expected a value, got none; add it"
    if kind == "value_error":  # a sentence of ours
        return f"{where}: {error['ctx']['error']}"
    return f"{where}: {_expected(error['msg'])}, got {short(error.get('input'))}; correct it"


def _expected(message: str) -> str:
    """What pydantic's message wants, as ours say it."""
    for theirs, ours in (
        ("Input should be a valid dictionary or instance of", "expected an object for"),
        ("Input should be a valid dictionary", "expected an object"),
        ("Input should be greater", "expected a number greater"),
        ("Input should be less", "expected a number less"),
        ("Input should be", "expected"),
        ("String should", "expected a string that should"),
    ):
        if message.startswith(theirs):
            return ours + message[len(theirs) :]
    return message


def _model_at(model: type[BaseModel], path: Sequence[str | int]) -> type[BaseModel]:
    """The model that `path` leads to: a field of models, or a mapping or an option of them."""
    for part in path:
        field = model.model_fields.get(str(part))
        if field is not None:  # else: the key of a mapping, whose model was found with its field
            kinds = (field.annotation, *get_args(field.annotation))
            model = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
    return model
