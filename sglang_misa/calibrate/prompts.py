"""Long prompts for a server that dumps: the user's, or text of this package itself."""

from __future__ import annotations

import http.client
import json
import os
import random
import urllib.error
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from sglang_misa import http_request, text_files
from sglang_misa.config import ConfigError
from sglang_misa.validation import short

CHARACTERS = 3  # of a token of source text, roughly and rather too few: a prompt must fit the server's context
TIMEOUT = 1800.0  # seconds for one prompt
_SHORTEN = "shorten it, or lower --length"
_LATER = f"it was asked {http_request.TRIES} times: repeat the command when it has room"
WAYS_OUT = {  # by HTTP status
    **{400: _SHORTEN, 401: "add --key-file with the server's key", 413: _SHORTEN},
    **dict.fromkeys(http_request.BUSY, _LATER),
}


def built_in(count: int, tokens: int) -> Iterator[str]:
    """`count` texts of about `tokens` tokens: the package's own source files, of which each ends with others.

    A dump's rows are of a prompt's end, and those of prompts that are held out must not be of the same text.
    """
    root = Path(str(resources.files("sglang_misa")))
    folders = os.walk(root, followlinks=True)  # of a checkout some are links
    files = sorted(Path(folder, name) for folder, _, names in folders for name in names if name.endswith(".py"))
    random.Random(0).shuffle(files)
    for number in range(count):
        own = files[number::count]
        others = random.Random(number).sample(rest := sorted({*files} - {*own}), len(rest))
        text, size = "".join(file.read_text(encoding="utf-8") for file in others + own), CHARACTERS * tokens
        yield (text * (size // len(text) + 1))[-size:]


def read(paths: Sequence[Path]) -> list[str]:
    """A prompt a file, or a line of a .jsonl file with "prompt" or "text". Raises ConfigError."""
    prompts = [prompt for path in paths for prompt in text_files.prompts(path, _refused)]
    empty = [number for number, prompt in enumerate(prompts) if not prompt.strip()]
    if empty or not prompts:
        raise ConfigError([f"--prompts: expected texts, got nothing in {empty or 'any file'}; leave them out"])
    return prompts


def _refused(problem: str) -> ConfigError:
    return ConfigError([f"--prompts: {problem}"])


@dataclass(frozen=True)
class Answer:
    """What a server said to a prompt of `tokens` tokens."""

    text: str
    tokens: int


def ask(url: str, number: int, prompt: str, new_tokens: int, key: str | None) -> Answer:
    """The greedy answer to prompt `number`. Raises ConfigError without one."""
    body = {"text": prompt, "sampling_params": {"max_new_tokens": new_tokens, "temperature": 0}}
    try:
        said = json.loads(http_request.ask_patiently(f"{url.rstrip('/')}/generate", key, TIMEOUT, body))
        text, tokens = said["text"], said["meta_info"]["prompt_tokens"]
        if not (isinstance(text, str) and isinstance(tokens, int) and tokens > 0):
            raise TypeError(f"text {short(text)} after {short(tokens)} tokens")
        return Answer(text, tokens)
    except urllib.error.HTTPError as error:
        told = http_request.said(error)
        way_out = WAYS_OUT.get(error.code, "check the address, and the server's log")
        raise ConfigError(
            [f"--server: expected an answer to prompt {number}, got {error.code}: {told}; {way_out}"]
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            [f"--server: expected SGLang's /generate at {url}, got another answer ({error!r}); check the address"]
        ) from None
    except (OSError, http.client.HTTPException) as error:
        raise ConfigError([f"--server: expected SGLang at {url}, got {error}; check the address"]) from None
