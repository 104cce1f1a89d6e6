"""A model server whose answers are known: it reads needles of every template, well or badly, on a real socket."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

LAYERS, TOPK = 2, 8


@dataclass
class Script:
    """How it answers. blind: depths (share of the prompt) at which it sees no fact; shift: taken off selections.

    hang_up: requests that it leaves without an answer; busy: statuses of its next answers, each with `Retry-After: 7`;
    miscount: added to the prompt tokens that it tells; policy: what its status says that it runs, in
    prompts over min_len; ranks: that tell it; room: its max_req_input_len.
    """

    blind: tuple[float, float] = (2.0, 2.0)
    reply: str = ""
    selections: bool = True
    shift: int = 0
    probability: float = 0.9
    recall: float | None = None
    ranks: int = 1
    hang_up: int = 0
    busy: list[int] = field(default_factory=list)
    miscount: int = 0
    policy: dict[str, str] = field(default_factory=dict)
    min_len: int = 0
    room: int = 8192
    asked: list[Any] = field(default_factory=list)

    def calls(self, sizes: list[int]) -> Counter[str]:
        """Indexer calls of prompts of some sizes, by what selects in them."""
        own = self.policy.get("prefill", "dsa")
        return Counter(own if size > self.min_len else "dsa" for size in sizes)


def decode(ids: list[int]) -> str:
    return bytes(ids).decode()


def answer(script: Script, text: str) -> str:
    question = re.search(r"(?:get|The pass word of|keep\? Answer:) (\w+)(?: is| keeps a)?$", text)
    name = question[1] if question else ""
    fact = re.search(rf"(?:set {name}|pass word of {name} is|{name} keeps a) (\w+)\.", text)
    if fact is None or script.blind[0] <= fact.start() / len(text) <= script.blind[1]:
        return " nothing"
    return f" {fact[1]}"


def handler(script: Script) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def send(self, data: Any, status: int = 200) -> None:
            body = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            if status != 200:
                self.send_header("Retry-After", "7")
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            if self.path == "/server_info":
                layers = {"0": {"recall": script.recall, "p10": 0.5, "rows": 4}} if script.recall else {}
                misa = {"enabled": True, "policy": script.policy, "recall": {"prefill": layers, "decode": {}}}
                sizes = [len(body["input_ids"]) for body in script.asked if body.get("input_ids")]
                misa |= {"min_len": {"prefill": script.min_len}, "calls": {"prefill": dict(script.calls(sizes))}}
                self.send(
                    {
                        "model_path": "scripted",
                        "max_req_input_len": script.room,
                        "internal_states": [{"misa": misa}] * script.ranks,
                    }
                )
            else:
                self.send({"data": [{"id": "scripted"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "null")
            if self.path == "/tokenize":
                self.send({"tokens": list(body["prompt"].encode())})
                return
            script.asked.append(body)
            if script.hang_up:
                script.hang_up -= 1
                self.close_connection = True
                return
            if script.busy:
                self.send("no room", script.busy.pop(0))
                return
            ids = body.get("input_ids", body.get("prompt"))
            new = body.get("max_tokens") or body["sampling_params"]["max_new_tokens"]
            text = (script.reply or answer(script, decode(ids)))[:new]
            if self.path == "/v1/completions":
                self.send({"choices": [{"text": text}], "usage": {"prompt_tokens": len(ids) + script.miscount}})
                return
            meta: dict[str, Any] = {"prompt_tokens": len(ids) + script.miscount, "completion_tokens": len(text)}
            if body.get("return_indexer_topk") and script.selections:
                rows = np.arange(len(ids) + len(text) - 1)[:, None, None]
                chosen = rows - np.arange(TOPK) - script.shift
                chosen = np.where(rows < TOPK - 1, -1, chosen)
                wide = np.broadcast_to(chosen, (len(rows), LAYERS, TOPK)).astype(np.int32)
                meta["indexer_topk"] = base64.b64encode(wide.tobytes()).decode()
            if body.get("return_logprob"):
                row = [[float(np.log(script.probability)), 1, None], [float(np.log(1 - script.probability)), 2, None]]
                meta["output_top_logprobs"] = [row] * len(text)
            self.send({"text": text, "output_ids": list(text.encode()), "meta_info": meta})

    return Handler


@contextmanager
def serving(script: Script) -> Iterator[str]:
    """The URL of a server that answers by `script`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(script))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
