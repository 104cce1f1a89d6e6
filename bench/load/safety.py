"""Safety of a load test: only near targets, no keys in artefacts, bounded bodies."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sglang_misa.bench.load.settings import Access, LoadError
from sglang_misa.key_mask import is_key

HIDDEN = "***"
NAME = r"[A-Za-z_][\w.-]{0,79}+"  # bounded and never given back, or a long word of a log would cost its square
VALUE = r"\"[^\"]*\"|'[^']*'|[^\s\"',)}\]]+"
# In free text: NAME=value, 'name': 'value', --name value, Authorization: Bearer value, user:password@host.
NAMED = (
    re.compile(rf"(?P<name>{NAME})(?P<between>[\"']?\s*[=:]\s*)(?P<value>{VALUE})"),
    re.compile(rf"(?P<name>(?<![\w-])--?{NAME})(?P<between>\s+)(?P<value>(?!-)(?:{VALUE}))"),
)
BEARER = re.compile(r"(\b(?:Bearer|Basic)\s+)([^\s\"',)}]+)", re.I)
PASSWORD = re.compile(r"(://[^/\s:@]+:)([^@\s/]+)(?=@)")
SECRET_WORDS = ("token", "key", "secret", "password", "passwd", "passphrase", "authorization", "credential")
PLAIN_ENDS = {"file", "path", "env", "id", "ids", "map", "len", "count", "type", "num"}  # --api-key-file names no key
PLAIN_STARTS = {"max", "min", "num"}
NOT_SECRET = {"none", "null", "true", "false", "bearer", "basic", HIDDEN}


def is_secret_name(name: str) -> bool:
    """Whether a value under this name is to be hidden: HF_TOKEN, --ssl-keyfile-password, apiKey; not max_token."""
    parts = [part for part in re.split(r"[^a-z0-9]+", name.lower()) if part]
    if not parts or parts[0] in PLAIN_STARTS or parts[-1] in PLAIN_ENDS:
        return False
    return any(part.endswith(SECRET_WORDS) for part in parts)


class Keys:
    """The API and the admin key, and the eraser that takes them, and whatever looks like them, out of artefacts."""

    def __init__(self, api: str | None = None, admin: str | None = None):
        self.api = api
        self.admin = admin

    @classmethod
    def read(cls, access: Access) -> Keys:
        """Keys from the environment or from files; raises LoadError when one that is named is not there."""
        return cls(
            _read_key("api", access.api_key_env, access.api_key_file),
            _read_key("admin", access.admin_key_env, access.admin_key_file),
        )

    def headers(self, *, admin: bool = False) -> dict[str, str]:
        key = (self.admin or self.api) if admin else self.api
        return {"Authorization": f"Bearer {key}"} if key else {}

    def erase(self, text: str) -> str:
        """Free text without keys: logs, commands, what servers answered."""
        for key in (self.api, self.admin):
            if key:  # as a word of its own: a key such as "123" must not eat digits of other words
                text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(key)}(?![A-Za-z0-9])", HIDDEN, text)
        text = BEARER.sub(lambda m: m[1] + HIDDEN, text)
        text = PASSWORD.sub(lambda m: m[1] + HIDDEN, text)
        for pattern in NAMED:
            text = pattern.sub(_hide, text)
        return text

    def clean(self, value: Any) -> Any:
        """JSON data of foreign making without keys: strings are erased, values under secret names are replaced."""
        if isinstance(value, str):
            return self.erase(value)
        if isinstance(value, Mapping):
            return {
                k: HIDDEN if v and isinstance(v, str | int) and is_secret_name(str(k)) else self.clean(v)
                for k, v in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.clean(v) for v in value]
        return value


def _hide(match: re.Match[str]) -> str:
    name, between, value = match["name"], match["between"], match["value"]
    if not is_secret_name(name) or value.strip("\"'").lower() in NOT_SECRET:
        return match[0]
    quote = value[0] if value[0] in "\"'" else ""
    return f"{name}{between}{quote}{HIDDEN}{quote}"


def _read_key(kind: str, variable: str | None, path: str | None) -> str | None:
    if variable is not None and path is not None:
        raise LoadError(f"{kind} key: expected one source, got --{kind}-key-env and --{kind}-key-file; drop one")
    if "" in (variable, path):
        raise LoadError(f"{kind} key: expected a name, got an empty one (an unset variable?); name one, or drop it")
    if variable is not None:
        key = os.environ.get(variable, "").strip()
        if not key:
            raise LoadError(
                f"{kind} key: expected a key in the environment variable {variable}, got nothing; export it"
            )
    elif path is not None:
        try:
            key = Path(path).read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise LoadError(
                f"{kind} key: expected a readable UTF-8 file, got {path} ({error}); correct the path"
            ) from None
    else:
        return None
    if not is_key(key):
        raise LoadError(f"{kind} key: expected one word of printable ASCII in {variable or path}, got another; mend it")
    return key


def check_target(url: str, *, allow_remote: bool) -> str:
    """`url` without a trailing slash, when it is http(s) and near; raises LoadError otherwise.

    Near means that every address of its host is loopback, private or link-local.
    """
    if HIDDEN in url:
        raise LoadError(
            f"target: expected a URL, got {url!r}, from which a key was erased; repeat the whole command with --out"
        )
    wrong = LoadError(f"target: expected http://host:port, got {url!r}; write the full URL")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:  # a port that is none, a bracket that stays open
        raise wrong from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or parts.query or parts.fragment:
        raise wrong
    if parts.path.rstrip("/").endswith("/v1"):
        raise LoadError(f"target: expected the server's root, got {url!r}; leave out /v1")
    if parts.username or parts.password:
        raise LoadError("target: expected a URL without a user and password; use --api-key-env or --api-key-file")
    if not allow_remote:
        try:
            found = {str(info[4][0]) for info in socket.getaddrinfo(parts.hostname, port or 80)}
        except (OSError, UnicodeError) as error:
            raise LoadError(f"target: expected a host that resolves, got {parts.hostname} ({error})") from None
        far = [a for a in found if not _near(ipaddress.ip_address(a.partition("%")[0]))]
        if far:
            raise LoadError(
                f"target: expected a loopback or private address, got {parts.hostname} ({', '.join(sorted(far))}); "
                "if you may load that server, add --allow-remote"
            )
    return url.rstrip("/")


def _near(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return address.is_loopback or address.is_link_local or (address.is_private and not address.is_unspecified)
