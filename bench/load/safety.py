"""What keeps a load test from hurting anybody: only near targets, keys never in artefacts, bounded bodies."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sglang_misa.bench.load.settings import Connection, LoadError

HIDDEN = "***"
SECRET_NAME = re.compile(
    r"(api|admin|hf|access|auth|secret)[-_]?(key|token)|password|passwd|secret|authorization", re.I
)
# In free text: --api-key X, api_key='X', "api_key": "X", Authorization: Bearer X, user:password@host.
SECRET_TEXT = (
    re.compile(
        r"((?:api|admin|hf|access|auth|secret)[-_]?(?:api[-_]?)?(?:key|token)[\"']?\s*[=: ]\s*[\"']?)([^\s\"',)}]+)",
        re.I,
    ),
    re.compile(r"(\bBearer\s+)([^\s\"']+)", re.I),
    re.compile(r"(://[^/\s:@]+:)([^@\s/]+)(?=@)"),
)
NOT_SECRET = {"none", "null", "true", "false"}


class Keys:
    """The API and the admin key, and the eraser that takes them, and whatever looks like them, out of artefacts."""

    def __init__(self, api: str | None = None, admin: str | None = None):
        self.api = api
        self.admin = admin

    @classmethod
    def read(cls, connection: Connection) -> Keys:
        """Keys from the environment or from files; raises LoadError when one that is named is not there."""
        return cls(
            _read_key("api", connection.api_key_env, connection.api_key_file),
            _read_key("admin", connection.admin_key_env, connection.admin_key_file),
        )

    def headers(self, *, admin: bool = False) -> dict[str, str]:
        key = (self.admin or self.api) if admin else self.api
        return {"Authorization": f"Bearer {key}"} if key else {}

    def erase(self, text: str) -> str:
        """`text` without keys."""
        for key in (self.api, self.admin):
            if key:
                text = text.replace(key, HIDDEN)
        for pattern in SECRET_TEXT:
            text = pattern.sub(lambda m: m[0] if m[2].lower() in NOT_SECRET else m[1] + HIDDEN, text)
        return text

    def clean(self, value: Any) -> Any:
        """JSON data without keys: strings are erased, values under secret names are replaced."""
        if isinstance(value, str):
            return self.erase(value)
        if isinstance(value, Mapping):
            return {
                k: HIDDEN if v and isinstance(v, str) and SECRET_NAME.search(str(k)) else self.clean(v)
                for k, v in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.clean(v) for v in value]
        return value


def _read_key(kind: str, variable: str | None, path: str | None) -> str | None:
    if variable and path:
        raise LoadError(f"{kind} key: expected one source, got --{kind}-key-env and --{kind}-key-file; drop one")
    if variable:
        key = os.environ.get(variable, "").strip()
        if not key:
            raise LoadError(
                f"{kind} key: expected a key in the environment variable {variable}, got nothing; export it"
            )
        return key
    if path:
        try:
            return Path(path).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise LoadError(f"{kind} key: expected a readable file, got {path} ({error.strerror})") from None
    return None


def check_target(url: str, *, allow_remote: bool) -> str:
    """`url` without a trailing slash, when it is http(s) and near; raises LoadError otherwise.

    Near means that every address of its host is loopback, private or link-local.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise LoadError(f"target: expected http://host:port, got {url!r}; write the full URL")
    if parts.username or parts.password:
        raise LoadError("target: expected a URL without a user and password; use --api-key-env or --api-key-file")
    if not allow_remote:
        try:
            found = {str(info[4][0]) for info in socket.getaddrinfo(parts.hostname, parts.port or 80)}
        except OSError as error:
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
