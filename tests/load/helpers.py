"""Mock servers as processes, single requests and whole runs against them, and what tests read off them."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import requests

from sglang_misa.bench.load import client
from sglang_misa.bench.load.figures import error_classes, summarize
from sglang_misa.bench.load.records import Record, Unit
from sglang_misa.bench.load.replies import Reply
from sglang_misa.procs import ServerProcess, free_port

MOCK = Path(__file__).with_name("mock_server.py")
START_S = 60.0
PROMPT = list(range(100, 400))
# The machine of a test run may be busy with other things: saturation has a test of its own.
PATIENT = ["--max-lag-s", "5", "--max-cpu-share", "5"]
SMALL = [*PATIENT, "--input-len", "1k", "--output-len", "8", "--requests", "4", "--warmup", "1"]


class MockProcess:
    """One mock server in a process of its own, on `port` or a free one; over TLS where it has a certificate."""

    def __init__(self, *flags: str, port: int | None = None, host: str = "127.0.0.1", certificate: Path | None = None):
        port = port or free_port()
        where = f"[{host}]" if ":" in host else host
        self.url = f"{'https' if certificate else 'http'}://{where}:{port}"
        self._certificate = certificate
        flags = (*flags, "--host", host, *(("--certificate", str(certificate)) if certificate else ()))
        log = Path(tempfile.mkstemp(prefix="mock-", suffix=".log")[1])
        self._process = ServerProcess([sys.executable, str(MOCK), "--port", str(port), *flags], log)
        self._process.wait_ready(self._answers, START_S)

    def _answers(self) -> bool:
        try:
            trusted = str(self._certificate) if self._certificate else True
            return requests.get(self.url + "/health", timeout=5, verify=trusted).status_code == 200
        except requests.ConnectionError:
            return False

    def script(self, **changes: Any) -> None:
        """Serve by the default script with `changes` from now on."""
        requests.post(self.url + "/flush_cache", timeout=5)
        self.sent()
        assert requests.post(self.url + "/_script", json=changes, timeout=5).status_code == 200

    def sent(self) -> dict[str, list[float]]:
        """Request number → perf_counter times: arrival, each frame with tokens, [DONE]. Forgets them."""
        return requests.get(self.url + "/_sent", timeout=5).json()  # type: ignore[no-any-return]

    def asked(self) -> dict[str, int]:
        """Path → requests since the last time."""
        return requests.get(self.url + "/_asked", timeout=5).json()  # type: ignore[no-any-return]

    def stop(self) -> None:
        self._process.stop()
        self._process.log.unlink()


def body_of(api: str, count: int) -> bytes:
    if api == "generate":
        return json.dumps({"input_ids": PROMPT, "sampling_params": {"max_new_tokens": count}, "stream": True}).encode()
    content = {"messages": [{"role": "user", "content": "hi"}]} if api == "chat" else {"prompt": PROMPT}
    options = {"include_usage": True, "continuous_usage_stats": True}
    return json.dumps(
        {"model": "m", "max_tokens": count, "stream": True, "stream_options": options, **content}
    ).encode()


def ask(url, api="generate", count=8, bound=20.0, stall=20.0, body=None, at_once=1) -> list[Reply]:
    async def go() -> list[Reply]:
        replies = [Reply() for _ in range(at_once)]
        async with client.session({}) as http:
            data = body or body_of(api, count)
            await asyncio.gather(*(client.exchange(http, url, api, data, bound, stall, r) for r in replies))
        return replies

    return asyncio.run(go())


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def figures(folder: Path, arm: int = 0) -> dict:
    return results(folder)["arms"][arm]["figures"]


def units(folder: Path) -> list[dict]:
    return sorted((json.loads(p.read_text()) for p in (folder / "units").glob("*.json")), key=lambda u: u["started"])


def record(pair: int, ttft: float, tpot: float = 0.01, tokens: int = 11, error: str | None = None) -> Record:
    """A request that took so many seconds, of 100 prompt tokens."""
    last = 1.0 + ttft + tpot * (tokens - 1)
    return Record(
        pair=pair,
        due=1.0,
        dispatched=1.0,
        first=None if error else 1.0 + ttft,
        last=last,
        done=last,
        gaps=(tpot,) * (tokens - 1),
        gap_tokens=(1,) * (tokens - 1),
        prompt_wanted=100,
        output_wanted=tokens,
        output_tokens=tokens,
        error=error,
    )


def unit(arm: str, block: int, records: list[Record], started: float) -> Unit:
    """A block of one cell, of ten seconds."""
    figures = summarize(records, (0.0, 10.0), sum(r.output_tokens or 0 for r in records), None)
    nothing: dict[str, float] = {}
    return Unit(
        arm=arm,
        cell="c",
        label="1k",
        block=block,
        started=started,
        figures=figures,
        errors=error_classes(records),
        client=nothing,
        gpu=nothing,
        metrics=nothing,
        misa=nothing,
        problems=(),
        notes=(),
        records=tuple(records),
    )
