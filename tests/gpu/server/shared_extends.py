"""Several requests in one extend call must select what each of them selects alone.

A request is a prefix that lies in the radix cache, as another request left it, and some new tokens. Alone and together
the same rows see the same keys, so on layer 0 the sets are the same; deeper layers follow the rounding of the first.
"""

from __future__ import annotations

import re
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from gpu.server.servers import EQUAL, SHAPE, Server, ask, overlaps

# (cached, new) tokens in order of arrival: whole pages, and as many new ones as no tile divides. The second request
# passes a gate of 8192 in its new rows, so stock's rows lie between those of a policy; the longest is not the last.
REQUESTS = ((12288, 300), (7936, 340), (40960, 700), (20480, 500))
CALL = re.compile(rb"Prefill batch.*?#new-seq: (\d+).*? graph: (True|False)")
LOG_LIMIT = 10.0  # seconds that the server's log may lag behind its answer


@dataclass(frozen=True)
class Call:
    """An extend call, as SGLang logs it."""

    requests: int
    graph: bool  # whether it replayed a prefill graph


def check(
    server: Server, requests: tuple[tuple[int, int], ...] = REQUESTS, *, graphs: bool = False
) -> tuple[list[str], dict[str, Any]]:
    """(problems, record) of `requests` sent one by one and then, over the same prefixes, in one message.

    With `graphs` an extend call of several must replay a prefill graph.
    """
    name, rng = server.log.stem, np.random.default_rng(1)
    prompts = [rng.integers(2, SHAPE.vocab, cached + new).tolist() for cached, new in requests]

    def warm() -> None:
        server.flush()
        for (cached, _), prompt in zip(requests, prompts, strict=True):
            ask(server, [prompt[:cached]], 1, tail=False)

    warm()
    alone = [ask(server, [prompt], 1, tail=True)[0] for prompt in prompts]
    warm()
    seen = server.log.stat().st_size
    together = ask(server, prompts, 1, tail=True)
    calls = _extend_calls(server, seen, len(prompts))

    problems, found = [], []
    if not any(call.requests > 1 and call.graph >= graphs for call in calls):
        where = "one replay of a prefill graph" if graphs else "one extend call"
        problems.append(f"{name}: expected several requests in {where}, got {calls}")
    for (cached, new), one, other in zip(requests, alone, together, strict=True):
        if {one.cached, other.cached} != {cached}:
            problems.append(f"{name}: expected {cached} cached tokens, got {one.cached} and {other.cached}")
        layers = overlaps(one.selected, other.selected)
        found.append({"cached": cached, "new": new, "rows": len(one.selected), "overlap": layers})
        if not layers[0] >= EQUAL:  # NaN, of no rows, is a problem too
            problems.append(f"{name}: {cached} + {new} tokens: expected its own sets among others, got {layers}")
    return problems, {"calls": [asdict(call) for call in calls], "requests": found}


def _extend_calls(server: Server, start: int, total: int) -> list[Call]:
    """The extend calls that the log names from byte `start` on, once they hold `total` requests."""
    deadline = time.monotonic() + LOG_LIMIT
    while True:
        with server.log.open("rb") as log:
            log.seek(start)
            found = CALL.findall(log.read())
        calls = [Call(int(requests), graph == b"True") for requests, graph in found]
        if sum(call.requests for call in calls) >= total or time.monotonic() > deadline:
            return calls
        time.sleep(0.1)
