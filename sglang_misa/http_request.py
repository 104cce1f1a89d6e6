"""One HTTP request to a server of ours, with the standard library alone.

A key goes to the address that the user named and nowhere else: no redirect is followed, no proxy is asked.
"""

from __future__ import annotations

import json
import urllib.request
from typing import Any

MAX_ANSWER = 64 * 1024 * 1024  # bytes that are read at most


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Leaves a redirect an HTTPError; the standard handler would take the key along to another host."""

    def redirect_request(self, *_: object) -> None:
        return None


OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)


def ask(url: str, key: str | None, timeout: float, body: Any = None) -> bytes:
    """The answer to a GET, or to a POST of `body` as JSON; timeout in seconds.

    Raises urllib.error.HTTPError for any status but 2xx, OSError where nobody answers, and ValueError for what is no
    http(s) address or answers without an end.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError("no address with http:// or https://")
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    data = None
    if body is not None:
        headers["Content-Type"], data = "application/json", json.dumps(body).encode()
    with OPENER.open(urllib.request.Request(url, data, headers), timeout=timeout) as answer:
        content: bytes = answer.read(MAX_ANSWER + 1)
    if len(content) > MAX_ANSWER:
        raise ValueError(f"more than {MAX_ANSWER >> 20} MiB")
    return content
