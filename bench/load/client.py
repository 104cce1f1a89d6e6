"""One measured request over HTTP: dispatch, stream, timestamps, tokens, and the class of what went wrong.

Every time is `time.perf_counter()` at the read that brought the bytes, taken before they are parsed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from pydantic_core import from_json

from sglang_misa.bench.load.settings import Api
from sglang_misa.bench.load.sse import EventTooLarge, SseParser

READ_BUFFER = 4 * 1024 * 1024  # aiohttp's 64 KiB default stalls streams beside 50K-token prompts
SEND_SLICE = 64 * 1024
MAX_EVENT = 32 * 1024 * 1024
MAX_RESPONSE = 1024 * 1024 * 1024
MAX_ERROR_BODY = 4096
PATHS: dict[Api, str] = {"generate": "/generate", "completions": "/v1/completions", "chat": "/v1/chat/completions"}
THOUGHT_FIELDS = ("content", "reasoning_content", "reasoning")


@dataclass(slots=True)
class Reply:
    """What came of one request. Times in seconds of perf_counter; `counts` are the tokens received up to each time."""

    dispatched: float = 0.0
    headers: float | None = None
    done: float | None = None
    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    exact: bool = True  # counts came with the chunks; otherwise the final total was spread over them
    text: str = ""
    output_ids: list[int] = field(default_factory=list)
    prompt_tokens: int | None = None
    completion_tokens: int = 0
    cached_tokens: int | None = None
    queue_s: float | None = None
    prefill_s: float | None = None
    finish: str | None = None
    error: str | None = None
    detail: str = ""
    received: int = 0


class StreamError(Exception):
    """A reply that cannot count; `kind` is its class."""

    def __init__(self, kind: str, detail: str):
        super().__init__(detail)
        self.kind = kind


def session(headers: dict[str, str]) -> aiohttp.ClientSession:
    """A session without limits of its own, one connection a request (a reused one may be closing at the other end)."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        read_bufsize=READ_BUFFER,
        headers=headers,
        trust_env=False,
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
    )


async def exchange(
    http: aiohttp.ClientSession, url: str, api: Api, body: bytes, bound_s: float, stall_s: float, reply: Reply
) -> None:
    """Send `body` once, never again, and follow the stream to its end in `reply`. Raises nothing but cancellation."""
    timeout = aiohttp.ClientTimeout(total=bound_s, sock_connect=min(30.0, bound_s), sock_read=stall_s)
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Accept": "text/event-stream"}
    reply.dispatched = time.perf_counter()
    try:
        async with http.post(
            url + PATHS[api], data=_slices(body), headers=headers, timeout=timeout, allow_redirects=False
        ) as response:
            reply.headers = time.perf_counter()
            if response.status != 200:
                text = (await response.content.read(MAX_ERROR_BODY)).decode("utf-8", "replace")
                raise StreamError(f"http_{response.status}", text)
            await _follow(response, api, reply)
    except StreamError as error:
        _fail(reply, error.kind, str(error))
    except aiohttp.SocketTimeoutError as error:
        _fail(reply, "stall" if reply.headers is not None else "timeout", str(error))
    except TimeoutError as error:
        _fail(reply, "timeout", str(error))
    except aiohttp.ClientConnectorError as error:
        _fail(reply, "refused", str(error))
    except (aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError) as error:
        reset = isinstance(error.__cause__, ConnectionResetError) or "reset" in str(error).lower()
        _fail(reply, "reset" if reset else "early_close", str(error))
    except (aiohttp.ClientOSError, ConnectionError) as error:
        _fail(reply, "reset", str(error))
    except aiohttp.ClientError as error:
        _fail(reply, "bad_stream", f"{type(error).__name__}: {error}")
    except asyncio.CancelledError:
        _fail(reply, "cut_off", "cancelled by the harness")
        raise


def _fail(reply: Reply, kind: str, detail: str) -> None:
    reply.error, reply.detail = kind, detail[:500]
    reply.done = time.perf_counter()


async def _slices(body: bytes) -> AsyncIterator[bytes]:
    """The body in slices, so that one large prompt does not hold the event loop."""
    view = memoryview(body)
    for start in range(0, len(view), SEND_SLICE):
        yield bytes(view[start : start + SEND_SLICE])


async def _follow(response: aiohttp.ClientResponse, api: Api, reply: Reply) -> None:
    parser = SseParser(MAX_EVENT)
    read = _read_generate if api == "generate" else _read_openai
    ended = False
    async for chunk in response.content.iter_any():
        now = time.perf_counter()
        reply.received += len(chunk)
        if reply.received > MAX_RESPONSE:
            raise StreamError("oversized", f"expected at most {MAX_RESPONSE} bytes in one answer, got more")
        try:
            events = parser.feed(chunk)
        except EventTooLarge as error:
            raise StreamError("oversized", str(error)) from None
        for event in events:
            reply.done = now
            if event.strip() == b"[DONE]":
                ended = True
                continue
            try:
                data = from_json(event)
            except ValueError as error:
                raise StreamError("bad_stream", f"expected JSON in an event, got {event[:80]!r} ({error})") from None
            if not isinstance(data, dict):
                raise StreamError("bad_stream", f"expected a JSON object in an event, got {event[:80]!r}")
            if data.get("error"):
                raise StreamError("server_error", str(data["error"]))
            if read(data, reply):
                reply.times.append(now)
                reply.counts.append(reply.completion_tokens)
                reply.exact = reply.exact and reply.completion_tokens > 0
    _finish(reply, ended=ended, pending=parser.pending)


def _finish(reply: Reply, *, ended: bool, pending: bool) -> None:
    if pending or not (ended or reply.finish):
        raise StreamError("early_close", "expected a finish reason or [DONE], got the end of the stream")
    if reply.finish in ("abort", "error"):
        raise StreamError("aborted", f"the server ended the request with {reply.finish!r}")
    if not reply.times:
        raise StreamError("no_tokens", "expected tokens, got none")
    if not reply.exact:
        chunks = len(reply.times)
        reply.completion_tokens = reply.completion_tokens or chunks
        reply.counts = [round(reply.completion_tokens * (i + 1) / chunks) for i in range(chunks)]


def _read_generate(data: dict[str, Any], reply: Reply) -> bool:
    """One event of SGLang's /generate, whose text and ids are cumulative or, with incremental output, the new part."""
    meta = data.get("meta_info") or {}
    before = reply.completion_tokens
    reply.completion_tokens = int(meta.get("completion_tokens") or before)
    ids, text = data.get("output_ids") or [], data.get("text") or ""
    cumulative = len(ids) >= reply.completion_tokens if ids else text.startswith(reply.text)
    reply.output_ids = ids if cumulative else reply.output_ids + ids
    reply.text = text if cumulative else reply.text + text
    reply.prompt_tokens = meta.get("prompt_tokens", reply.prompt_tokens)
    reply.cached_tokens = meta.get("cached_tokens", reply.cached_tokens)
    reply.queue_s = meta.get("queue_time", reply.queue_s)
    if meta.get("prefill_finished_time") and meta.get("forward_entry_time"):
        reply.prefill_s = meta["prefill_finished_time"] - meta["forward_entry_time"]
    finish = meta.get("finish_reason")
    reply.finish = finish.get("type") if isinstance(finish, dict) else finish or reply.finish
    return reply.completion_tokens > before


def _read_openai(data: dict[str, Any], reply: Reply) -> bool:
    """One event of an OpenAI-compatible server. Role-only and usage-only chunks carry no token; reasoning does."""
    carries = False
    for choice in data.get("choices") or []:
        delta = choice.get("delta") or {}
        parts = [choice.get("text") or "", *(delta.get(name) or "" for name in THOUGHT_FIELDS)]
        carries = carries or any(parts) or bool(delta.get("tool_calls"))
        reply.text += "".join(parts)
        reply.finish = choice.get("finish_reason") or reply.finish
    usage = data.get("usage") or {}
    if usage:
        reply.completion_tokens = int(usage.get("completion_tokens") or reply.completion_tokens)
        reply.prompt_tokens = usage.get("prompt_tokens", reply.prompt_tokens)
        details = usage.get("prompt_tokens_details") or {}
        reply.cached_tokens = details.get("cached_tokens", reply.cached_tokens)
    return carries
