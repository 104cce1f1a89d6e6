"""Parsers of answer streams: tokens and their times, text, counts, cache hits, and the finish reason.

A token is what the server counts: text alone is not a token (a read may bring several, speculative decoding does), and
a token may come without text (half a character, a special token).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic_core import from_json

from sglang_misa.bench.load.fields import count, counts, mapping, mappings, number, text
from sglang_misa.bench.load.sse import Event

MAX_TEXT = 64 * 1024 * 1024  # characters of an answer that are kept at most
SMALL_EVENT = 4 * 1024  # bytes; longer cumulative events are read at their tail only
META = b'"meta_info":'
HALF = b"\\ud"  # begins the escape of half a character
# An event with none of them tells of a fault.
ANSWER_FIELDS = {"choices", "text", "output_ids", "meta_info", "usage", "id"}
THOUGHT_FIELDS = ("reasoning_content", "reasoning")  # names of one text; some servers send both
FAILED = ("abort", "error")  # finish reasons after which no other one counts


@dataclass(slots=True)
class Reply:
    """What came of one request. Times in seconds of perf_counter; `counts` are the tokens received up to each time."""

    dispatched: float = 0.0
    headers: float | None = None
    done: float | None = None
    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    exact: bool = True  # counts came with the reads; otherwise the final total was spread over them
    text: str = ""
    output_ids: list[int] = field(default_factory=list)
    prompt_tokens: int | None = None
    completion_tokens: int | None = None  # None where the server never counts
    cached_tokens: int | None = None
    queue_s: float | None = None
    prefill_s: float | None = None
    finish: str | None = None
    error: str | None = None
    detail: str = ""
    received: int = 0

    def token(self, now: float) -> None:
        """Tokens came by the read at `now`; what one read brings came at one time."""
        count = self.completion_tokens
        if count is None:
            self.exact = False
            count = (self.counts[-1] if self.counts else 0) + 1
        if self.counts and count < self.counts[-1]:  # a server that takes tokens back
            self.exact = False
        if self.times and self.times[-1] == now:
            self.counts[-1] = count
        else:
            self.times.append(now)
            self.counts.append(count)

    def ends(self, reason: str | None) -> None:
        """The server told why it stopped, if it told."""
        if reason and self.finish not in FAILED:
            self.finish = reason


class StreamError(Exception):
    """A reply that cannot count; `kind` is its class."""

    def __init__(self, kind: str, detail: str):
        super().__init__(detail)
        self.kind = kind


class Reader(Protocol):
    """Understands the events of one API."""

    def read(self, event: Event, reply: Reply) -> bool:
        """Take one event into `reply`; whether it brought tokens. Raises StreamError."""

    def close(self, reply: Reply) -> None:
        """The stream has ended: complete text and ids."""


class GenerateReader:
    """SGLang's /generate, whose text and ids are cumulative or, with incremental output, the new part.

    A cumulative stream repeats the whole answer in each event. Of a long event only the tail, `meta_info`, is parsed;
    text and ids are taken from the last one, so the work grows with the answer's length and not with its square.
    """

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._kept = 0
        self._cumulative = False  # until the ids of a second token tell
        self._last = b""

    def read(self, event: Event, reply: Reply) -> bool:
        if self._cumulative and len(event.data) > SMALL_EVENT and (at := event.data.rfind(META)) > 0:
            self._last = event.data
            return self._count(parse(Event(event.name, b"{" + event.data[at:])), reply)
        data = parse(event)
        came = self._count(data, reply)
        self._take(data, reply)
        self._last = b""
        return came

    def close(self, reply: Reply) -> None:
        if self._last:
            self._take(parse(Event(b"", self._last)), reply)
        reply.text = whole(self._parts)

    def _take(self, data: dict[str, Any], reply: Reply) -> None:
        ids, written = counts(data, "output_ids"), text(data, "text")
        so_far = reply.completion_tokens or 0
        cumulative = len(ids) >= so_far if ids else written.startswith("".join(self._parts))
        if ids and so_far > 1:
            self._cumulative = cumulative
        if cumulative:
            reply.output_ids, self._parts, self._kept = ids, [written], len(written)
        else:
            reply.output_ids.extend(ids)
            self._parts.append(written)
            self._kept += len(written)
        if self._kept > MAX_TEXT:
            raise StreamError("oversized", f"expected at most {MAX_TEXT} characters of text, got more")

    @staticmethod
    def _count(data: dict[str, Any], reply: Reply) -> bool:
        meta = mapping(data, "meta_info")
        before = reply.completion_tokens or 0
        now = count(meta, "completion_tokens")
        if now is not None:
            reply.completion_tokens = now
        reply.prompt_tokens = count(meta, "prompt_tokens", reply.prompt_tokens)
        reply.cached_tokens = count(meta, "cached_tokens", reply.cached_tokens)
        reply.queue_s = number(meta, "queue_time", reply.queue_s)
        done, began = number(meta, "prefill_finished_time"), number(meta, "forward_entry_time")
        if done and began:
            reply.prefill_s = done - began
        if isinstance(meta.get("finish_reason"), dict):
            finish = mapping(meta, "finish_reason")
            reply.ends(str(finish.get("type")))
            reply.detail = str(finish.get("message") or reply.detail)
        else:
            reply.ends(text(meta, "finish_reason"))
        if now is None:
            return bool(data.get("text") or data.get("output_ids"))
        return now > before


class OpenAiReader:
    """An OpenAI-compatible server. Role-only and usage-only chunks carry no token; reasoning does."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._kept = 0

    def read(self, event: Event, reply: Reply) -> bool:
        data = parse(event)
        choices = mappings(data, "choices")
        wrote = role_only = False
        for choice in choices:
            delta = mapping(choice, "delta")
            thought = next((said for name in THOUGHT_FIELDS if (said := text(delta, name))), "")
            parts = [text(choice, "text"), thought, text(delta, "content")]
            wrote = wrote or any(parts) or bool(delta.get("tool_calls"))
            role_only = role_only or (bool(delta.get("role")) and not any(parts))
            self._parts += parts
            self._kept += sum(map(len, parts))
            reply.ends(text(choice, "finish_reason"))
        if self._kept > MAX_TEXT:
            raise StreamError("oversized", f"expected at most {MAX_TEXT} characters of text, got more")
        usage = mapping(data, "usage")
        if not usage or (role_only and not wrote):
            return wrote
        before = reply.completion_tokens or 0
        reply.completion_tokens = count(usage, "completion_tokens", reply.completion_tokens)
        reply.prompt_tokens = count(usage, "prompt_tokens", reply.prompt_tokens)
        details = mapping(usage, "prompt_tokens_details")
        reply.cached_tokens = count(details, "cached_tokens", reply.cached_tokens)
        return wrote or (bool(choices) and (reply.completion_tokens or 0) > before)

    def close(self, reply: Reply) -> None:
        reply.text = whole(self._parts)


def parse(event: Event) -> dict[str, Any]:
    """The JSON object of an event. Raises StreamError for what is none, or tells of an error in any known shape."""
    if event.name == b"error":
        raise StreamError("server_error", event.data.decode("utf-8", "replace"))
    try:
        data = _json(event.data)
    except (ValueError, RecursionError) as error:
        raise StreamError("bad_stream", f"expected JSON in an event, got {event.data[:80]!r} ({error})") from None
    if not isinstance(data, dict):
        raise StreamError("bad_stream", f"expected a JSON object in an event, got {event.data[:80]!r}")
    told = data.get("error") or data.get("errors")
    if told:
        raise StreamError("server_error", _message(told))
    flat = "error" in (data.get("object"), data.get("type"))
    foreign = not ANSWER_FIELDS & data.keys() and bool({"message", "detail", "details", "code"} & data.keys())
    if flat or foreign:
        raise StreamError("server_error", _message(data))
    return data


def _json(data: bytes) -> Any:
    """What JSON says. Raises ValueError and RecursionError.

    A token may end in the middle of a character, and some servers write that as half of a surrogate pair, which
    from_json refuses.
    """
    try:
        return from_json(data)
    except ValueError:
        if HALF not in data.lower():
            raise
        return json.loads(data)


def whole(parts: Iterable[str]) -> str:
    """A text from its parts, halves of characters put together, and replaced where the other half never came."""
    return "".join(parts).encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def finish(reply: Reply, *, ended: bool, pending: bool) -> None:
    """Judge a stream that has ended. Raises StreamError unless its tokens and its finish reason came."""
    if reply.finish in FAILED:
        raise StreamError("aborted", reply.detail or f"the server ended the request with {reply.finish!r}")
    if pending or not reply.finish:
        what = "[DONE]" if ended else "the end of the stream"
        raise StreamError("early_close", f"expected a finish reason, got {what}")
    if not reply.times:
        raise StreamError("no_tokens", "expected tokens, got none")
    total = reply.completion_tokens
    if total is None:
        reply.counts, reply.exact = [], False
    elif not reply.exact or reply.counts[-1] != total:
        reads = len(reply.times)
        reply.exact = False
        reply.counts = [round(total * (i + 1) / reads) for i in range(reads)]


def _message(told: Any) -> str:
    return str(told.get("message") or told.get("detail") or told) if isinstance(told, dict) else str(told)
