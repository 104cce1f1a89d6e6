"""SGLang's decode side of disaggregated prefill: pages that came from elsewhere get their statistics before a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sglang_misa.patches.pool import last_slots


def pop_transferred(original: Callable[..., list[Any]], self: Any, rids_to_check: list[str] | None = None) -> list[Any]:
    """DecodeTransferQueue.pop_transferred: the requests whose pages a prefill server has written, all of them by now.

    On the scheduler's stream, for which every forward waits.
    """
    requests = original(self, rids_to_check)
    table = self.scheduler.req_to_token_pool.req_to_token
    if requests:  # the newest token was sampled by the prefill server, and is not stored
        slots = torch.cat([last_slots(table[_row(request), : request.seqlen - 1]) for request in requests])
        _pages_written(self.scheduler.token_to_kv_pool_allocator.get_kvcache(), slots)
    return requests


def _row(request: Any) -> int:
    """A request's row of req_to_token, which from 0.5.22 on is kept by its `kv`."""
    row: int = (request if hasattr(request, "req_pool_idx") else request.kv).req_pool_idx
    return row


def load_cpu_copy(
    original: Callable[..., None], self: Any, kv_cache_cpu_dict: Any, indices: Tensor, *args: Any, **kwargs: Any
) -> None:
    """DSATokenToKVPool.load_cpu_copy: a retracted request's pages, back from the host at other places."""
    original(self, kv_cache_cpu_dict, indices, *args, **kwargs)
    _pages_written(self, last_slots(indices))


def _pages_written(pool: Any, last: Tensor) -> None:
    selector = pool.misa_selector
    if selector.ladders.decodes:
        for layer, pages in enumerate(pool.index_k_with_scale_buffer):
            if len(pages):
                selector.engine.pages_written(layer, last)
