"""API keys: read from files, and kept out of the log and of the server's answers.

SGLang prints its arguments at launch and repeats them in /server_info, where an ordinary key would read the admin key.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from sglang_misa.arguments import Parser
from sglang_misa.config import ConfigError
from sglang_misa.validation import named_file, small_text

FLAGS = ("--api-key", "--admin-api-key", "--ssl-keyfile-password")  # SGLang's flags whose values are secrets
MASK = b"***"
NOTHING = rb"(?!)"  # a pattern that no text matches
REPEATS_ARGUMENTS = "server_info"  # how the paths end whose answer holds SGLang's arguments

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Callable[[], Awaitable[Message]], Send], Awaitable[None]]


def given(words: Sequence[str]) -> tuple[str, ...]:
    """The secrets among SGLang's command line `words`, each once. Raises ConfigError for a flag without one."""
    parser = Parser(add_help=False, allow_abbrev=False)
    for flag in FLAGS:
        parser.add_argument(flag)
    found = vars(parser.parse_known_args(words)[0]).values()
    return tuple(dict.fromkeys(key for key in found if key))


def read(flag: str, path: str) -> str:
    """The one key in the file at `path`. Raises ConfigError, which names `flag`."""
    try:
        found = small_text(named_file(flag, path)).split()
    except PermissionError:
        groups = ", ".join(map(str, sorted({os.getegid(), *os.getgroups()})))
        raise ConfigError(
            [
                f"{flag}: expected a file that uid {os.getuid()} can read, got {path}; give it mode 0640 and one of "
                f"the groups {groups} (SECRETS_GID in Compose, fsGroup in Kubernetes)"
            ]
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{flag}: expected a readable text file, got {path} ({error}); check it"]) from None
    if len(found) != 1:
        raise ConfigError([f"{flag}: expected one key in {path}, got {len(found)} words; leave only the key"])
    if not is_key(found[0]):
        raise ConfigError([f"{flag}: expected a key of printable ASCII in {path}, got another character; make one"])
    return found[0]


def is_key(word: str) -> bool:
    """Whether an HTTP header can carry `word`, which errors about headers would otherwise repeat."""
    return word.isascii() and word.isprintable() and len(word.split()) == 1


class Mask:
    """A stream of bytes with MASK in place of each key: line by line, as no key holds a line's end.

    A key is found as it is, as Python's repr writes it and as JSON does.
    """

    def __init__(self, keys: Sequence[str]):
        forms = {form.encode() for key in keys for form in (key, repr(key)[1:-1], json.dumps(key)[1:-1])}
        ordered = sorted(forms, key=len, reverse=True)  # of two that begin alike, the longer is the one to find
        self._pattern = re.compile(b"|".join(map(re.escape, ordered)) or NOTHING)
        self._held = b""

    def feed(self, chunk: bytes) -> bytes:
        """The lines that `chunk` ends; a carriage return ends one too, for progress bars."""
        text = self._held + chunk
        end = max(text.rfind(b"\n"), text.rfind(b"\r")) + 1
        self._held = text[end:]
        return self._pattern.sub(MASK, text[:end])

    def end(self) -> bytes:
        """The last line, where nothing ended it."""
        held, self._held = self._held, b""
        return self._pattern.sub(MASK, held)


class MaskArguments:
    """ASGI middleware: /server_info and /get_server_info with MASK in place of each key."""

    def __init__(self, app: App, keys: Sequence[str]):
        self._app, self._keys = app, keys

    async def __call__(self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].rstrip("/").endswith(REPEATS_ARGUMENTS):
            await self._app(scope, receive, send)
            return
        start: Message = {}
        mask, body = Mask(self._keys), b""

        async def masked(message: Message) -> None:
            nonlocal body
            if message["type"] == "http.response.start":
                start.update(message)
                return
            body += mask.feed(message.get("body", b""))
            if message.get("more_body"):
                return
            body += mask.end()
            length = (b"content-length", str(len(body)).encode())
            headers = [header for header in start["headers"] if header[0].lower() != length[0]]
            await send({**start, "headers": [*headers, length]})
            await send({"type": "http.response.body", "body": body})

        await self._app(scope, receive, masked)
