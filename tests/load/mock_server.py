"""A model server of scripted delays and faults, on a real socket: what a load test must find out is known here.

It runs as a process of its own, so that its clock does not share the client's event loop. Both read CLOCK_MONOTONIC,
and every frame's send time is kept, so a test can compare arrivals with the truth instead of with a wished-for delay.
`python mock_server.py --port 8000 --ttft 0.05 --itl 0.002`; POST /_script changes it, GET /_sent reads the truth.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import ssl
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
from aiohttp import web
from aiohttp.typedefs import Handler

PAGE = 64
FIRST_BYTE_ID = 100  # its tokenizer: one token a UTF-8 byte, after a hundred reserved ids


@dataclass(frozen=True)
class Script:
    """How each request is served. Seconds; a fault strikes every `fault_every`-th request."""

    ttft: float = 0.02
    itl: float = 0.002
    chunk: int = 1  # tokens a frame, as speculative decoding sends them
    incremental: bool = False
    continuous: bool = True  # usage in every frame, where the request asks for it
    reasoning: int = 0  # leading tokens that come as reasoning_content
    cut: int = 0  # send frames in pieces of this many bytes
    pad: int = 0  # bytes of extra data in each frame
    answer: str = ""  # text generated; "needle" answers the question in the prompt, empty counts
    usage: bool = True  # OpenAI streams tell usage at all
    mirror: bool = False  # reasoning comes under both of its names
    silent: int = 0  # leading tokens without text
    batch: int = 1  # frames sent in one write
    bom: bool = False
    gzip: str = ""  # asked = where the client accepts it, always = anyway
    fault: str = ""  # a status, or one of the words that `stream` knows
    fault_every: int = 1
    fault_after: int = 2  # frames sent before a fault in the stream
    misa: str = ""  # policy told in /server_info, empty for none
    misa_calls: bool = True
    captured: bool = False  # the decode policy is a captured graph, and only stock's is replayed
    busy_tokenizer: int = 0  # this call of /tokenize, counted from the script's start, answers 503
    tokenizer: bool = True
    answers: dict[str, Any] = field(default_factory=dict)  # path → what it answers instead; a number is a status
    told: dict[str, Any] = field(default_factory=dict)  # what /server_info tells beside the rest
    crowd: float = 0.0  # seconds of extra TTFT for each request in flight
    others: int = 0  # requests that run for somebody else
    block_first: float = 0.0  # seconds of extra TTFT of the first request after a flush


class Mock:
    def __init__(self, script: Script):
        self.script = script
        self.seen: list[np.ndarray] = []
        self.sent: dict[str, list[float]] = {}
        self.asked: Counter[str] = Counter()
        self.requests = self.misa = self.tokenized = self.running = 0

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 30, middlewares=[self.instead])
        app.add_routes(
            [
                web.get("/health", self.health),
                web.get("/server_info", self.info),
                web.get("/metrics", self.metrics),
                web.get("/v1/models", self.models),
                web.post("/flush_cache", self.flush),
                web.post("/tokenize", self.tokenize),
                web.post("/detokenize", self.detokenize),
                web.post("/generate", self.generate),
                web.post("/v1/completions", self.completions),
                web.post("/v1/chat/completions", self.chat),
                web.post("/_script", self.change),
                web.get("/_sent", self.truth),
                web.get("/_asked", self.tally),
            ]
        )
        return app

    @web.middleware
    async def instead(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        self.asked[request.path] += 1
        answer = self.script.answers.get(request.path)
        if answer is None:
            return await handler(request)
        return web.Response(status=answer) if isinstance(answer, int) else web.json_response(answer)

    async def tally(self, request: web.Request) -> web.Response:
        asked, self.asked = self.asked, Counter()
        return web.json_response(asked)

    async def health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def info(self, request: web.Request) -> web.Response:
        state: dict[str, Any] = {}
        if self.script.misa:
            calls = {"prefill": {self.script.misa: self.misa, "dsa": 3}, "decode": {"captured:dsa": 7}}
            state["misa"] = {"enabled": True, "policy": {"prefill": self.script.misa, "decode": "dsa"}, "calls": calls}
            if self.script.captured:
                calls["decode"]["captured:hisa"] = 549
                state["misa"] |= {
                    "policy": {"prefill": self.script.misa, "decode": "hisa"},
                    "min_len": {"prefill": 8192, "decode": 32768},
                    "replays": {"dsa": self.requests},
                }
        info = {"page_size": PAGE, "api_key": "sk-in-server-info", "internal_states": [state]}
        return web.json_response(info | self.script.told)

    async def metrics(self, request: web.Request) -> web.Response:
        text = (
            "# TYPE sglang:queue_time_seconds histogram\n"
            f'sglang:queue_time_seconds_bucket{{le="+Inf"}} {self.requests}\n'
            f"sglang:queue_time_seconds_sum {0.25 * self.requests}\n"
            f"sglang:queue_time_seconds_count {self.requests}\n"
            f"sglang:num_running_reqs {self.script.others}\n"
        )
        return web.Response(text=text)

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "mock-model"}]})

    async def flush(self, request: web.Request) -> web.Response:
        self.seen.clear()
        return web.Response(text="flushed")

    async def change(self, request: web.Request) -> web.Response:
        self.script = replace(Script(), **await request.json())
        self.requests = self.tokenized = 0
        return web.json_response(asdict(self.script))

    async def truth(self, request: web.Request) -> web.Response:
        sent, self.sent = self.sent, {}
        return web.json_response(sent)

    async def tokenize(self, request: web.Request) -> web.Response:
        if not self.script.tokenizer:
            raise web.HTTPNotFound
        self.tokenized += 1
        if self.tokenized == self.script.busy_tokenizer:
            raise web.HTTPServiceUnavailable
        body = await request.json()
        text = (
            body["prompt"] if "prompt" in body else "".join(f"<|{m['role']}|>{m['content']}" for m in body["messages"])
        )
        ids = encode(text)
        return web.json_response({"tokens": ids, "count": len(ids), "max_model_len": 1 << 20})

    async def detokenize(self, request: web.Request) -> web.Response:
        return web.json_response({"text": decode((await request.json())["tokens"])})

    async def serve(
        self, request: web.Request, prompt: list[int], count: int, api: str, options: dict[str, bool]
    ) -> web.StreamResponse:
        self.running += 1
        try:
            return await self.stream(request, prompt, count, api, options)
        finally:
            self.running -= 1

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        return await self.serve(request, body["input_ids"], body["sampling_params"]["max_new_tokens"], "generate", {})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        ids = encode(body["prompt"]) if isinstance(body["prompt"], str) else body["prompt"]
        return await self.serve(request, ids, body["max_tokens"], "completions", body.get("stream_options", {}))

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        ids = encode("".join(f"<|{m['role']}|>{m['content']}" for m in body["messages"]))
        return await self.serve(request, ids, body["max_tokens"], "chat", body["stream_options"])

    def cached(self, ids: np.ndarray) -> int:
        """Longest common prefix with what was served since the flush, in whole pages, without the last token."""
        best = 0
        for other in self.seen:
            n = min(len(ids) - 1, len(other))
            differ = np.flatnonzero(ids[:n] != other[:n])
            best = max(best, int(differ[0]) if len(differ) else n)
        return best // PAGE * PAGE

    async def stream(
        self, request: web.Request, prompt: list[int], count: int, api: str, options: dict[str, bool]
    ) -> web.StreamResponse:
        script, usage = self.script, options.get("continuous_usage_stats", False)
        self.requests += 1
        self.misa += script.misa_calls
        number = self.requests
        start = time.perf_counter()
        fault = script.fault if number % script.fault_every == 0 else ""
        if fault in ("429", "500"):
            return web.Response(status=int(fault), text="no: Bearer sk-echoed-back")
        if fault == "307":
            raise web.HTTPTemporaryRedirect("http://127.0.0.1:9/elsewhere")
        if fault == "json":
            return web.json_response({"message": "this model does not stream"})
        ids = np.array(prompt, dtype=np.int32)
        cached = self.cached(ids)
        extra = script.block_first if not self.seen else 0.0
        text, output = answer(script, prompt, count)
        self.seen.append(np.concatenate([ids, np.array(output[:-1], np.int32)]))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        if script.gzip == "always" or (script.gzip and "gzip" in request.headers.get("Accept-Encoding", "")):
            response.enable_compression(web.ContentCoding.gzip)
        await response.prepare(request)
        if script.bom:
            await response.write(b"\xef\xbb\xbf")
        transport = request.transport
        assert transport is not None
        transport.set_write_buffer_limits(high=0)
        sent = self.sent.setdefault(f"{number}", [start])

        held: list[bytes] = []

        async def send(frame: bytes, last: bool = True) -> None:
            held.append(frame)
            if len(held) < script.batch and not last:
                return
            frame = b"".join(held)
            held.clear()
            for i in range(0, len(frame), script.cut or len(frame)):
                await response.write(frame[i : i + (script.cut or len(frame))])

        if api == "chat":  # the role comes before any token, with a usage that claims one
            role: dict[str, Any] = {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
            await send(
                frame_of({**role, **({"usage": {"prompt_tokens": len(ids), "completion_tokens": 1}} if usage else {})})
            )
        due = time.perf_counter() + script.ttft + extra + script.crowd * self.running
        steps = list(range(0, count, script.chunk))
        for step, first in enumerate(steps):
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            due += script.itl * script.chunk
            done = min(count, first + script.chunk)
            if fault and step == script.fault_after:
                if fault == "stall":
                    await asyncio.sleep(3600)
                elif fault == "reset":
                    transport.abort()
                    return response
                elif fault == "early_close":
                    return response
                elif fault in FAULT_FRAMES:
                    await send(FAULT_FRAMES[fault])
                if fault in LAST_FAULTS:
                    await send(b"data: [DONE]\n\n")
                    return response
            finish = "length" if done == count else None
            sent.append(time.perf_counter())
            event = self.event(script, api, usage, text, output, first, done, finish, len(ids), cached)
            await send(frame_of(event), last=done == count)
        if options.get("include_usage") and script.usage:
            totals = {
                "prompt_tokens": len(ids),
                "completion_tokens": count,
                "prompt_tokens_details": {"cached_tokens": cached},
            }
            await send(frame_of({"choices": [], "usage": totals}))
        sent.append(time.perf_counter())
        await send(b"data: [DONE]\n\n")
        return response

    def event(
        self,
        script: Script,
        api: str,
        usage: bool,
        text: list[str],
        output: list[int],
        first: int,
        done: int,
        finish: str | None,
        prompt: int,
        cached: int,
    ) -> dict[str, Any]:
        padding = {"padding": "x" * script.pad} if script.pad else {}
        start = first if script.incremental or api != "generate" else 0
        part = "".join(text[max(start, script.silent) : done])
        if api == "generate":
            meta = {
                "prompt_tokens": prompt,
                "completion_tokens": done,
                "cached_tokens": cached,
                "queue_time": 0.25,
                "forward_entry_time": 100.0,
                "prefill_finished_time": 100.5,
                "finish_reason": {"type": finish, "length": done} if finish else None,
            }
            return {"text": part, "output_ids": output[start:done], "meta_info": meta, **padding}
        if api == "completions":
            choice: dict[str, Any] = {"text": part, "finish_reason": finish}
        else:
            name = "reasoning_content" if done <= script.reasoning else "content"
            both = {"reasoning": part} if script.mirror and name == "reasoning_content" else {}
            choice = {"delta": {name: part, **both}, "finish_reason": finish}
        tells = usage and script.continuous and script.usage
        totals = {"usage": {"prompt_tokens": prompt, "completion_tokens": done}} if tells else {}
        return {"choices": [choice], **totals, **padding}


def answer(script: Script, prompt: list[int], count: int) -> tuple[list[str], list[int]]:
    """Text by token, and token ids, of `count` generated tokens."""
    if script.answer == "needle":
        text = decode(prompt)
        asked = re.findall(r"what is the code of vault (\d+)\?", text)
        facts = dict(re.findall(r"the code of vault (\d+) is (\d{7})\.", text))
        text = f" {facts.get(asked[-1], '0000000') if asked else ''}."
    else:
        text = script.answer or "and so on "
    characters = [text[i % len(text)] if script.answer != "needle" else text[i : i + 1] or " " for i in range(count)]
    return characters, [FIRST_BYTE_ID + ord(c) % 256 for c in characters]


def encode(text: str) -> list[int]:
    return [FIRST_BYTE_ID + b for b in text.encode()]


def decode(ids: list[int]) -> str:
    return bytes((i - FIRST_BYTE_ID) % 256 for i in ids).decode("utf-8", "replace")


def frame_of(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


TOO_LONG = {"type": "abort", "message": "Input length (131072 tokens) exceeds the maximum allowed length"}
FAULT_FRAMES = {  # what a fault in the stream sends
    "error_event": frame_of({"error": {"message": "out of memory", "code": 500}}),
    "error_flat": frame_of({"object": "error", "message": "EngineCore died", "code": 500}),
    "error_foreign": frame_of({"code": 400, "details": "guard tripped"}),
    "error_half": b'data: {"error": {"message": "half \\ud83d"}}\n\n',
    "error_named": b"event: error\ndata: overloaded\n\n",
    "abort": frame_of({"text": "", "output_ids": [], "meta_info": {"finish_reason": TOO_LONG}}),
    "bad_json": b"data: {half\n\n",
}
LAST_FAULTS = ("error_flat", "error_foreign", "error_named", "abort", "done")  # after which the stream ends


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--startup", type=float, default=0.0)
    parser.add_argument("--api-key", default="")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--certificate", default="")  # a PEM file with its key
    plain = [each for each in fields(Script) if each.name not in ("answers", "told")]
    for each in plain:
        kind = type(each.default)
        parser.add_argument(
            f"--{each.name.replace('_', '-')}", type=kind if kind is not bool else _flag, default=each.default
        )
    arguments = vars(parser.parse_args())
    print(f"loading, api_key='{arguments['api_key']}'", flush=True)
    await asyncio.sleep(arguments["startup"])
    script = Script(**{each.name: arguments[each.name] for each in plain})
    runner = web.AppRunner(Mock(script).app(), handler_cancellation=True)
    await runner.setup()
    tls = None
    if arguments["certificate"]:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(arguments["certificate"])
    await web.TCPSite(runner, arguments["host"], arguments["port"], backlog=1024, ssl_context=tls).start()
    print("ready", flush=True)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()


def _flag(word: str) -> bool:
    return word.lower() in ("1", "true", "yes")


if __name__ == "__main__":
    asyncio.run(main())
