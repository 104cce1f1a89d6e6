"""What a server may write into its answer, byte by byte: each stream with the class or the tokens that it must give."""

from __future__ import annotations

import asyncio
import json
import re
import zlib
from collections.abc import Sequence
from typing import Any

import pytest
from load.helpers import body_of

from sglang_misa.bench.load import client
from sglang_misa.bench.load.fields import FieldError
from sglang_misa.bench.load.replies import GenerateReader, OpenAiReader, Reply
from sglang_misa.bench.load.sse import Event

DONE = b"data: [DONE]\n\n"
PAUSE_S = 0.01  # between two pieces, so that each comes in a read of its own


def head(kind: str = "text/event-stream", *more: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", "Connection: close", *more]
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode()


def written(number: int, **more: Any) -> dict[str, Any]:
    """An event with the token of this number, of four."""
    choice = {"text": "x", "finish_reason": "length" if number == 4 else None}
    return {"choices": [choice], "usage": {"prompt_tokens": 4, "completion_tokens": number}, **more}


def event(data: Any, begin: bytes = b"data: ", end: bytes = b"\n") -> bytes:
    return begin + (data if isinstance(data, bytes) else json.dumps(data).encode()) + end + end


FOUR = [written(number) for number in (1, 2, 3, 4)]
EVENTS = [event(data) for data in FOUR]


def answered(pieces: Sequence[bytes], api: str = "completions", *, hold: bool = False) -> Reply:
    """What the client makes of these bytes; with `hold` the connection stays open behind them."""
    reply = Reply()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", asked, re.I)
        assert length is not None
        await reader.readexactly(int(length[1]))
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(PAUSE_S)
        if hold:
            await reader.read()  # until the client goes
        writer.close()

    async def go() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server, client.session({}) as http:
            await client.exchange(http, url, api, body_of(api, 4), 5.0, 5.0, reply)  # type: ignore[arg-type]

    asyncio.run(go())
    return reply


def packed(pieces: Sequence[bytes], bits: int) -> list[bytes]:
    compressor = zlib.compressobj(wbits=bits)
    return [compressor.compress(piece) + compressor.flush(zlib.Z_SYNC_FLUSH) for piece in pieces]


WHOLE = {
    "as it should be": [head(), *EVENTS, DONE],
    "in one read": [head() + b"".join(EVENTS) + DONE],
    "without a blank behind the colon": [head(), *(event(data, b"data:") for data in FOUR), b"data:[DONE]\n\n"],
    "lines end with CRLF": [head(), *(event(data, end=b"\r\n") for data in FOUR), b"data: [DONE]\r\n\r\n"],
    "lines end with CR": [head(), *(event(data, end=b"\r") for data in FOUR), b"data: [DONE]\r\r"],
    "CRLF cut in two": [head(), *(p for e in EVENTS for p in (e[:-2] + b"\r", b"\n\r", b"\n")), DONE],
    "no blank line behind [DONE]": [head(), *EVENTS, DONE[:-1]],
    "no [DONE], no blank line in the end": [head(), *EVENTS[:3], EVENTS[3][:-1]],
    "heartbeats": [head(), b": ping\n\n", EVENTS[0], b"data:\n\n", b"event: ping\n\n", event({}), *EVENTS[1:], DONE],
    "more behind [DONE]": [head(), *EVENTS, DONE, event(written(5)), event({"error": "too late"})],
    "gzip": [head("text/event-stream", "Content-Encoding: gzip"), *packed([*EVENTS, DONE], 31)],
    "deflate": [head("text/event-stream", "Content-Encoding: deflate"), *packed([*EVENTS, DONE], 15)],
    "no error": [head(), event(written(1, error=None)), event(written(2, error="", code=0)), *EVENTS[2:], DONE],
}


@pytest.mark.parametrize("case", WHOLE)
def test_four_tokens_come_out_of(case):
    reply = answered(WHOLE[case])
    assert (reply.error, reply.completion_tokens, reply.finish) == (None, 4, "length"), reply.detail
    assert reply.counts[-1] == 4


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_a_character_that_two_tokens_share(api):
    """Each token brings half of a surrogate pair, as an escape; the half that stays alone is replaced."""
    halves = ["\ud83d", "\ude00", "x", "\ud83d"]
    told = []
    for data, half in zip(FOUR, halves, strict=True):
        choice = {"text": half} if api == "completions" else {"delta": {"content": half}}
        told.append({**data, "choices": [{**choice, "finish_reason": data["choices"][0]["finish_reason"]}]})
    reply = answered([head(), *map(event, told), DONE], api)
    assert (reply.error, reply.completion_tokens, reply.text) == (None, 4, "\U0001f600x\ufffd"), reply.detail


def test_an_answer_ends_with_done_where_the_connection_stays_open():
    reply = answered([head(), *EVENTS, DONE], hold=True)
    assert reply.error is None, reply.detail


def test_a_line_that_ends_with_cr_needs_no_next_read():
    """Otherwise each token would be counted a read late."""
    reply = answered([head(), *(event(data, end=b"\r") for data in FOUR), DONE])
    assert reply.counts == [1, 2, 3, 4]


BROKEN = {
    "a page": ([head("text/html"), b"<html>Sign in</html>"], "bad_stream", "text/html: b'<html>Sign in"),
    "lines of JSON": ([head("application/x-ndjson"), *(e[6:] for e in EVENTS)], "bad_stream", "expected server-sent"),
    "nothing": ([head()], "early_close", "the end of the stream"),
    "cut inside an event": ([head(), *EVENTS[:3], EVENTS[3][:30]], "early_close", "finish reason"),
    "cut before the end": ([head("text/event-stream", "Content-Length: 900"), EVENTS[0]], "early_close", "900"),
    "plain bytes called gzip": ([head("x/y", "Content-Encoding: gzip"), *EVENTS], "bad_stream", "gzip"),
    "busy": ([head("x/y", "Retry-After: 9", status="503 Busy"), b"later"], "http_503", "Retry-After 9: later"),
    "an error that another reason follows": (
        [head(), EVENTS[0], event({"choices": [{"text": "", "finish_reason": "error"}]}), *EVENTS[1:], DONE],
        "aborted",
        "error",
    ),
    "a list": ([head(), EVENTS[0], event([{"error": {"message": "boom"}}])], "bad_stream", "boom"),
    "words": ([head(), EVENTS[0], event(b"Internal Server Error")], "bad_stream", "Internal Server Error"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_no_answer_comes_out_of(case):
    pieces, kind, why = BROKEN[case]
    reply = answered(pieces)
    assert reply.error == kind, reply.detail
    assert why in reply.detail


ODD = ["many", -1, 1.5, True, [1], {"a": 1}, 2**31, 10**400, float("inf")]
OPENAI_FIELDS = [
    ("choices", lambda odd: {"choices": odd}),
    ("delta", lambda odd: {"choices": [{"delta": odd}]}),
    ("content", lambda odd: {"choices": [{"delta": {"content": odd}}]}),
    ("text", lambda odd: {"choices": [{"text": odd}]}),
    ("finish_reason", lambda odd: {"choices": [{"text": "x", "finish_reason": odd}]}),
    ("usage", lambda odd: {"choices": [], "usage": odd}),
    ("completion_tokens", lambda odd: {"choices": [], "usage": {"completion_tokens": odd}}),
    ("prompt_tokens", lambda odd: {"choices": [], "usage": {"prompt_tokens": odd}}),
    ("cached_tokens", lambda odd: {"choices": [], "usage": {"prompt_tokens_details": {"cached_tokens": odd}}}),
]
GENERATE_FIELDS = [
    ("output_ids", lambda odd: {"output_ids": odd}),
    ("text", lambda odd: {"text": odd}),
    ("meta_info", lambda odd: {"meta_info": odd}),
    ("completion_tokens", lambda odd: {"meta_info": {"completion_tokens": odd}}),
    ("queue_time", lambda odd: {"meta_info": {"queue_time": odd}}),
    ("prefill_finished_time", lambda odd: {"meta_info": {"prefill_finished_time": odd}}),
]
FIT = {  # what of ODD may stand under a name
    **{text: ["many"] for text in ("content", "text", "finish_reason")},
    **{table: [{"a": 1}] for table in ("delta", "usage", "meta_info")},
    **{time: [-1, 1.5, 2**31] for time in ("queue_time", "prefill_finished_time")},
    "output_ids": [[1]],
}


@pytest.mark.parametrize(
    ("reader", "field", "make"),
    [(OpenAiReader, *row) for row in OPENAI_FIELDS] + [(GenerateReader, *row) for row in GENERATE_FIELDS],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_field_of_another_kind_is_named(reader, field, make):
    for odd in ODD:
        event_of_it = Event(b"", json.dumps(make(odd)).encode())
        if odd in FIT.get(field, []) and odd is not True:
            reader().read(event_of_it, Reply())
        else:
            with pytest.raises(FieldError, match=f"expected {field} to be "):
                reader().read(event_of_it, Reply())


def test_such_a_field_is_the_requests_error():
    reply = answered([head(), EVENTS[0], event(written(2, usage=[7])), *EVENTS[2:], DONE])
    assert (reply.error, reply.detail) == ("bad_stream", "expected usage to be an object, got '[7]'")


def test_counts_that_fall_are_no_exact_counts():
    told = [written(number, usage={"completion_tokens": 9 - number}) for number in (1, 2, 3, 4)]
    reply = answered([head(), *map(event, told), DONE])
    assert (reply.error, reply.completion_tokens, reply.exact) == (None, 5, False)
