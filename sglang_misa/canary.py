"""A canary over page statistics: each step a random sample of them is computed anew from the pool and compared by bits.

Only complete pages of the step's own requests are looked at: freed pages may hold anything. What is compared stays on
the device until the comparison is done there, so that no step waits: a mismatch is told at a later step.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sglang_misa import runtime
from sglang_misa.config import VerifyStats
from sglang_misa.engines import Engine
from sglang_misa.metrics import recorder
from sglang_misa.page_sample import PageSample, PageSampler

logger = logging.getLogger(__name__)

SAMPLE = 16  # pages of one layer that a step looks at


class StaleStatistics(RuntimeError):
    """A page's stored statistics are not those of its bytes."""


@dataclass(frozen=True)
class _Look:
    """One step's sample of `layer`, and what `Engine.compared` says of it."""

    layer: int
    requests: Sequence[str]  # of the step
    sample: PageSample
    seen: Tensor
    wrong: Tensor  # on the host
    done: torch.cuda.Event | None  # behind the copy of `wrong`

    def problems(self) -> list[str]:
        """One sentence for each wrong page, with the values that differ. Waits for the device."""
        found = []
        for i in (self.wrong == 1).nonzero().flatten().tolist():
            stored, expected = self.seen[:, i].cpu().view(torch.uint8)
            (first, *more) = (stored != expected).nonzero().flatten().tolist()
            page, request = int(self.sample.pages[i]), self.requests[int(self.sample.rows[i])]
            found.append(
                f"page {page} of layer {self.layer}, request {request}: expected byte {first} of its statistics to be "
                f"{int(expected[first])} as computed from the pool, got {int(stored[first])} (and {len(more)} more "
                "bytes differ)"
            )
        return found


class Canary:
    """Looks at the statistics of one pool's pages, once a step."""

    def __init__(self, engine: Engine, layers: Sequence[int], action: VerifyStats, seed: int = 0):
        """`layers`: those of the pool whose indexer runs; `action`: what a mismatch does, see `MisaConfig`."""
        self.engine, self.layers, self.action = engine, tuple(layers), action
        self._random = random.Random(seed)
        self._sampler = PageSampler(SAMPLE, self._random)
        self._looks: deque[_Look] = deque()

    def step(self, req_to_token: Tensor, req_ids: Tensor, seq_lens: Tensor, requests: Sequence[str]) -> None:
        """Look at SAMPLE pages of a step that is over, on its stream.

        req_to_token [R, L] integer: SGLang's slots of each request's tokens; req_ids [B], seq_lens [B]: rows of it and
        tokens stored, of the step's requests; requests: their names. Raises StaleStatistics for an earlier step's
        mismatch where the action says so, and on a CPU for this one's.
        """
        if len(requests):
            self._looks.append(self._look(req_to_token, req_ids, seq_lens, requests))
        while self._looks and (self._looks[0].done is None or self._looks[0].done.query()):
            self._tell(self._looks.popleft())

    def _look(self, req_to_token: Tensor, req_ids: Tensor, seq_lens: Tensor, requests: Sequence[str]) -> _Look:
        layer = self._random.choice(self.layers)
        sample = self._sampler.draw(req_to_token, req_ids[: len(requests)], seq_lens[: len(requests)])
        seen, wrong = self.engine.compared(layer, sample.pages)
        done = None
        if wrong.is_cuda:
            wrong = torch.empty_like(wrong, device="cpu", pin_memory=True).copy_(wrong, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        return _Look(layer, requests, sample, seen, wrong, done)

    def _tell(self, look: _Look) -> None:
        verdicts = look.wrong.tolist()
        wrong = verdicts.count(1)
        recorder.verified(wrong + verdicts.count(0), wrong)
        if wrong == 0:
            return
        problems = look.problems()
        for problem in problems:
            logger.error("%s", problem)
        if self.action == "raise":
            raise StaleStatistics("; ".join(problems))


def of_runner(runner: Any) -> Canary | None:
    """The canary of a loaded ModelRunner's pool, made at its first step; None where it is off or for a draft model."""
    if not hasattr(runner, "misa_canary"):
        action, pool = runtime.current().config.verify_stats, runner.token_to_kv_pool
        on = action != "off" and not runner.is_draft_worker
        layers = [layer - pool.start_layer for layer in runner.misa_layers] if on else ()
        runner.misa_canary = Canary(pool.misa_selector.engine, layers, action) if on else None
    canary: Canary | None = runner.misa_canary
    return canary
