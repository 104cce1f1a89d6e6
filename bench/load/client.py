"""One measured request over HTTP: dispatch, stream, timestamps, and the class of what went wrong.

Every time is `time.perf_counter()` at the read that brought the bytes, taken before they are parsed.
"""

from __future__ import annotations

import asyncio
import errno
import ssl
import time
from collections.abc import AsyncIterator

import aiohttp
from aiohttp.http_exceptions import ContentEncodingError

from sglang_misa.bench.load import replies
from sglang_misa.bench.load.fields import FieldError
from sglang_misa.bench.load.replies import GenerateReader, OpenAiReader, Reader, Reply, StreamError
from sglang_misa.bench.load.settings import Api
from sglang_misa.bench.load.sse import EventTooLarge, SseParser

READ_BUFFER = 4 * 1024 * 1024  # aiohttp's 64 KiB default stalls streams beside 50K-token prompts
SEND_SLICE = 64 * 1024
MAX_EVENT = 32 * 1024 * 1024
MAX_ERROR_BODY = 4096
MAX_DETAIL = 500  # characters of a reason that are kept
SHOWN = 80  # bytes of an answer that is no stream
DONE = b"[DONE]"
CONNECT_S = 30.0
OWN_LIMITS = (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL)  # open files and ports of this machine
PATHS: dict[Api, str] = {"generate": "/generate", "completions": "/v1/completions", "chat": "/v1/chat/completions"}


def session(headers: dict[str, str], tls: ssl.SSLContext | None = None) -> aiohttp.ClientSession:
    """A session without limits of its own, one connection a request (a reused one may be closing at the other end)."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True, ssl=tls if tls is not None else True),
        read_bufsize=READ_BUFFER,
        headers=headers,
        trust_env=False,
        cookie_jar=aiohttp.DummyCookieJar(),
    )


async def exchange(
    http: aiohttp.ClientSession, url: str, api: Api, body: bytes, bound_s: float, stall_s: float, reply: Reply
) -> None:
    """Send `body` once, never again, and follow the stream to its end in `reply`. Raises nothing but cancellation."""
    timeout = aiohttp.ClientTimeout(total=bound_s, sock_connect=min(CONNECT_S, bound_s), sock_read=stall_s)
    headers = {
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Accept": "text/event-stream",
        "Accept-Encoding": "identity",  # a compressor on the way would hold tokens back
    }
    reply.dispatched = time.perf_counter()
    try:
        async with http.post(
            url + PATHS[api], data=_slices(body), headers=headers, timeout=timeout, allow_redirects=False
        ) as response:
            reply.headers = time.perf_counter()
            if response.status != 200:
                raise StreamError(f"http_{response.status}", await _reason(response))
            if response.content_type == "application/json":
                raise StreamError("server_error", "expected a stream, got one JSON body: " + await _reason(response))
            await _follow(response, api, reply)
    except StreamError as error:
        _fail(reply, error.kind, str(error))
    except aiohttp.SocketTimeoutError as error:
        _fail(reply, "stall" if reply.headers is not None else "timeout", str(error))
    except TimeoutError as error:
        _fail(reply, "timeout", str(error) or f"expected an answer within {bound_s:.0f} s, got none")
    except aiohttp.ClientConnectorCertificateError as error:
        _fail(reply, "tls", f"{error}; see --ca-file")
    except aiohttp.ClientConnectorError as error:
        _fail(reply, "client_limit" if error.os_error.errno in OWN_LIMITS else "refused", str(error))
    except (aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError) as error:
        reset = isinstance(error.__cause__, ConnectionResetError) or "reset" in str(error).lower()
        coded = isinstance(error.__cause__, ContentEncodingError)
        _fail(reply, "reset" if reset else "bad_stream" if coded else "early_close", str(error))
    except (aiohttp.ClientOSError, ConnectionError) as error:
        _fail(reply, "reset", str(error))
    except aiohttp.ClientError as error:
        _fail(reply, "bad_stream", f"{type(error).__name__}: {error}")
    except asyncio.CancelledError:
        _fail(reply, "cut_off", "cancelled by the harness")
        raise


def _fail(reply: Reply, kind: str, detail: str) -> None:
    reply.error, reply.detail = kind, detail[:MAX_DETAIL]
    reply.done = time.perf_counter()


async def _reason(response: aiohttp.ClientResponse) -> str:
    location, later = response.headers.get("Location"), response.headers.get("Retry-After")
    told = f"redirected to {location}; give that URL: " if location else f"Retry-After {later}: " if later else ""
    return told + (await response.content.read(MAX_ERROR_BODY)).decode("utf-8", "replace")


async def _slices(body: bytes) -> AsyncIterator[bytes]:
    """The body in slices, so that one large prompt does not hold the event loop."""
    view = memoryview(body)
    for start in range(0, len(view), SEND_SLICE):
        yield bytes(view[start : start + SEND_SLICE])


async def _follow(response: aiohttp.ClientResponse, api: Api, reply: Reply) -> None:
    parser = SseParser(MAX_EVENT)
    reader: Reader = GenerateReader() if api == "generate" else OpenAiReader()
    first = b""  # read
    began = ended = False
    try:
        async for chunk in response.content.iter_any():
            now = time.perf_counter()
            reply.received += len(chunk)
            first = first or chunk[:SHOWN]
            for event in parser.feed(chunk):
                began, reply.done = True, now
                if event.data.strip() == DONE:
                    ended = True
                    break  # a server may keep the connection, and what it sends then is no part of the answer
                if reader.read(event, reply):
                    reply.token(now)
            if ended:
                break
        for event in () if ended else parser.close():
            ended = event.data.strip() == DONE
            if not ended and reader.read(event, reply):
                reply.token(now)
        reader.close(reply)
    except EventTooLarge as error:
        raise StreamError("oversized", str(error)) from None
    except FieldError as error:
        raise StreamError("bad_stream", str(error)) from None
    if first and not began:
        told = response.headers.get("Content-Type", "no content type")
        raise StreamError("bad_stream", f"expected server-sent events, got {told}: {first!r}")
    replies.finish(reply, ended=ended, pending=parser.pending and not ended)
