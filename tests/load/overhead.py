"""What the client adds: 64 streams with prompts of 128K tokens, each arrival against the moment the server sent it.

`python tests/load/overhead.py [streams] [prompt tokens]`; the figures in bench/load/README.md come from here.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from load.helpers import MockProcess

from sglang_misa.bench.load import client
from sglang_misa.bench.load.replies import Reply
from sglang_misa.bench.load.watch import LoopWatch

TTFT_S, ITL_S, TOKENS = 20.0, 0.05, 128


async def drive(url: str, streams: int, body: bytes) -> tuple[list[Reply], dict[str, float]]:
    replies = [Reply() for _ in range(streams)]
    async with client.session({}) as http, LoopWatch() as watch:
        await asyncio.gather(*(client.exchange(http, url, "generate", body, 600.0, 600.0, r) for r in replies))
    return replies, watch.figures()


def main() -> None:
    streams, length = (int(word) for word in (*sys.argv[1:], 64, 128 * 1024)[:2])
    server = MockProcess("--ttft", str(TTFT_S), "--itl", str(ITL_S), "--incremental", "1")
    ids = np.random.default_rng(0).integers(100, 128_000, length).tolist()
    body = json.dumps({"input_ids": ids, "sampling_params": {"max_new_tokens": TOKENS}, "stream": True}).encode()
    replies, health = asyncio.run(drive(server.url, streams, body))
    assert all(r.error is None for r in replies)
    sent = sorted(server.sent().values(), key=lambda times: times[1])
    server.stop()
    replies.sort(key=lambda r: r.times[0])
    late = 1e3 * np.array([np.array(r.times) - np.array(s[1:-1]) for r, s in zip(replies, sent, strict=True)])
    size, every = len(body) >> 10, 1e3 * ITL_S
    print(f"{streams} streams × {length} tokens ({size} KiB), {TOKENS} tokens each, one in {every:.0f} ms")
    for name, values in (("first token", late[:, 0]), ("every token", late)):
        p50, p99 = np.percentile(values, [50, 99])
        print(f"  {name} late by ms: min {values.min():.2f} p50 {p50:.2f} p99 {p99:.2f} max {values.max():.2f}")
    print("  " + "  ".join(f"{name} {value:.4f}" for name, value in health.items()))


if __name__ == "__main__":
    main()
