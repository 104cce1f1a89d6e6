"""Agreement of ranks: digests of what they select, and of their pages' statistics, that they compare themselves.

Every rank of an attention group runs the whole indexer over the same rows. One that selects other tokens attends to
them with its own heads alone: nothing fails, answers merely get worse. So each adds up digests on its device, inside
CUDA graphs too, and once in some steps all of them exchange the sums.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, distributed

from sglang_misa.engines import Engine
from sglang_misa.metrics import recorder
from sglang_misa.page_sample import PageSampler
from sglang_misa.runtime import Runtime

ROWS = 256  # of a call, evenly spread from a place that changes (not in a captured call), that are digested
PAGES = 1024  # complete pages of the step's requests whose statistics are
_GOLDEN, _MIX = -7046029254386353131, -4658895280553007687  # splitmix64's odd constants, as int64


class RanksDisagree(RuntimeError):
    """Ranks of one attention group selected different tokens, or hold different statistics of the same pages."""


class Agreement:
    """The digests of one rank and KV pool, and its meetings with its peers."""

    def __init__(self, engine: Engine, every: int, peers: distributed.ProcessGroup):
        """every: steps from one meeting to the next; peers: the ranks' process group, on the CPU."""
        self.engine, self.every, self.peers = engine, every, peers
        means = engine.stats.means
        self._selected = torch.zeros(len(means), dtype=torch.int64, device=means[0].device)
        self._sampler = PageSampler(PAGES, random.Random(0))
        self._steps = 0

    def selected(self, layer: int, ids: Tensor) -> None:
        """Add what one call of `layer` selected: ids integer [T, k], in any order, -1 for none. Capturable."""
        stride = max(1, -(-len(ids) // ROWS))
        start = zlib.crc32(f"{self._steps} {layer}".encode()) % stride  # in all ranks alike
        self._selected[layer] += digest(ids[start::stride].long())

    def forget(self) -> None:
        """Begin anew: what was selected so far was made up, to capture graphs."""
        self._selected.zero_()

    def step(self, req_to_token: Tensor, req_ids: Tensor, seq_lens: Tensor, requests: int) -> None:
        """Call after each step, in every rank alike; meets once in `every`. Arguments as `Canary.step`'s.

        requests: how many of the rows are no padding. Raises RanksDisagree, then in all ranks.
        """
        self._steps += 1
        if self._steps % self.every:
            return
        pages = self._sampler.draw(req_to_token, req_ids[:requests], seq_lens[:requests]).where_drawn()
        stats = [self._statistics(layer, pages) for layer in range(len(self._selected))]
        mine = torch.stack((self._selected, torch.stack(stats))).cpu()
        self.forget()
        every = [torch.empty_like(mine) for _ in range(distributed.get_world_size(self.peers))]
        distributed.all_gather(every, mine, group=self.peers)
        told = [
            f"{what} in layers {layers}"
            for what, row in (("other tokens", 0), ("other page statistics", 1))
            if (layers := _layers_that_differ([each[row] for each in every]))
        ]
        if told:
            raise RanksDisagree(
                f"expected all {len(every)} ranks to select the same in the last {self.every} steps, got "
                f"{' and '.join(told)}; serve with --misa-preset dsa, and report this with the model and the GPUs"
            )
        recorder.ranks_compared += 1

    def _statistics(self, layer: int, pages: Tensor) -> Tensor:
        if not len(self.engine.stats.means[layer]):
            return self._selected.new_zeros(())
        words = torch.cat([each.view(torch.int32) for each in self.engine.stats.of(layer, pages)], dim=1).long()
        return digest(words + (torch.arange(words.shape[1], device=words.device) << 32))


def digest(rows: Tensor) -> Tensor:
    """A number of int64 [N, n] for the values of each row in any order, and for the order of the rows: int64 []."""
    number = torch.arange(len(rows), device=rows.device)
    return _mixed(_mixed(rows).sum(1) + number * _GOLDEN).sum()


def _mixed(values: Tensor) -> Tensor:
    values = (values + 1) * _GOLDEN
    values = (values ^ (values >> 32)) * _MIX
    return values ^ (values >> 29)


def _layers_that_differ(digests: Sequence[Tensor]) -> list[int]:
    ranks = torch.stack(tuple(digests))
    layers: list[int] = (ranks != ranks[0]).any(0).nonzero().flatten().tolist()
    return layers


def agreement_for(runtime: Runtime, engine: Engine) -> Agreement | None:
    """The agreement of the target model's pool; None where it is off, and for a rank that has no peers."""
    every, layers = runtime.config.verify_ranks, len(engine.stats.means)
    on = every > 0 and runtime.peers is not None and runtime.is_target(layers)
    return Agreement(engine, every, runtime.peers) if on else None
