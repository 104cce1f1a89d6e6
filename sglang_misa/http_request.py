"""One HTTP request to a server of ours, with the standard library alone.

A key goes to the address that the user named and nowhere else: no redirect is followed, no proxy is asked.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

MAX_ANSWER = 64 * 1024 * 1024  # bytes that are read at most
BUSY, TRIES = (429, 503), 5  # statuses of a server that has no room at the time, and requests until that is its answer
PAUSE_S, MAX_PAUSE_S = 3.0, 60.0  # before the next, where the server names no seconds, and at most where it does
SAID_BYTES, SAID_S = 300, 5.0  # that are read of an error's answer, and seconds that they may take

Result = TypeVar("Result")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Leaves a redirect an HTTPError; the standard handler would take the key along to another host."""

    def redirect_request(self, *_: object) -> None:
        return None


OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)


def within(limit_s: float, work: Callable[[], Result]) -> Result:
    """What `work` returns. Raises what it raises, and TimeoutError after `limit_s` seconds.

    A timeout of an HTTP library bounds a single read, and a server may send a byte now and then for ever. A thread of
    its own waits for it, and is left behind where the time is up: it ends with the answer, or with this program.
    """
    done: Future[Result] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    if done not in wait([done], limit_s).done:
        raise TimeoutError(f"no whole answer within {limit_s:g} s")
    return done.result()


def ask(url: str, key: str | None, timeout: float, body: Any = None) -> bytes:
    """The answer to a GET, or to a POST of `body` as JSON; timeout in seconds, of the whole of it.

    Raises urllib.error.HTTPError for any status but 2xx, OSError where nobody answers in time, and ValueError for what
    is no http(s) address or answers without an end.
    """
    return within(timeout, lambda: _ask(url, key, timeout, body))


def ask_patiently(url: str, key: str | None, timeout: float, body: Any = None) -> bytes:
    """As `ask`, sent again while the server is busy; timeout in seconds, of each try."""
    tried = 0
    while True:
        try:
            return ask(url, key, timeout, body)
        except urllib.error.HTTPError as error:
            tried += 1
            if not again(tried, error.code, error.headers.get("Retry-After")):
                raise
            error.close()


def again(tried: int, status: int, retry_after: str | None) -> bool:
    """Whether to send a request again whose `tried`-th answer had `status`; where so, after a pause.

    retry_after: the answer's header of that name, of which seconds are read and a date is not.
    """
    if status not in BUSY or tried >= TRIES:
        return False
    named = (retry_after or "").strip()
    time.sleep(min(float(named), MAX_PAUSE_S) if named.isdecimal() else PAUSE_S)
    return True


def said(error: urllib.error.HTTPError) -> str:
    """The beginning of an error's answer; the status's own words where it does not come in time, or whole."""
    try:
        return within(SAID_S, lambda: error.read(SAID_BYTES)).decode("utf-8", "replace")
    except (OSError, ValueError, http.client.HTTPException):
        return str(error.reason)


def _ask(url: str, key: str | None, timeout: float, body: Any) -> bytes:
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
