"""SGLang's KV pool: page statistics beside the index-K pages, and their place in the memory budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from sglang_misa import runtime
from sglang_misa.kernels.layout import PAGE, statistics_bytes
from sglang_misa.metrics import recorder
from sglang_misa.selection import Selector


def init(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """DSATokenToKVPool.__init__: the pool owns what selects for its layers, as `misa_selector`."""
    original(self, *args, **kwargs)
    self.misa_selector = Selector(runtime.current(), self.index_k_with_scale_buffer)
    recorder.page_stats_bytes += self.misa_selector.engine.stats.nbytes


def selector_of(runner: Any) -> Selector | None:
    """What selects for a ModelRunner's pool; None for a draft model whose pool has no index keys."""
    return getattr(runner.token_to_kv_pool, "misa_selector", None)


def compute_cell_size(original: Callable[..., int], self: Any, runner: Any, num_layers: int) -> int:
    """DefaultPoolConfigurator._compute_cell_size: bytes of a token over all layers, its share of statistics too."""
    page = statistics_bytes(runtime.current().config.sketch)
    return original(self, runner, num_layers) + math.ceil(page / PAGE) * num_layers


def load_to_device_per_layer(
    original: Callable[..., None],
    self: Any,
    device_pool: Any,
    host_indices: Tensor,
    device_indices: Tensor,
    layer_id: int,
    *args: Any,
    is_draft: bool = False,
    **kwargs: Any,
) -> None:
    """DSAIndexerPoolHost.load_to_device_per_layer: pages from the host cache, and their statistics behind them.

    Both on the stream of the load, whose event the layer waits for.
    """
    draft = {"is_draft": True} if is_draft else {}  # not a parameter before 0.5.18
    original(self, device_pool, host_indices, device_indices, layer_id, *args, **draft, **kwargs)
    layer = 0 if is_draft else layer_id
    pages = device_pool.index_k_with_scale_buffer[layer]
    if len(pages) and device_pool.misa_selector.ladders.decodes:
        last = last_slots(device_indices)
        if pages.is_cuda and not last.is_cuda:  # SGLang's direct copies have their slots on the host, its kernels not
            last = last.pin_memory().to(pages.device, non_blocking=True)
        device_pool.misa_selector.engine.pages_written(layer, last)


def last_slots(slots: Tensor) -> Tensor:
    """The last one of each page that a request's `slots` [n] fill, int64."""
    return slots[PAGE - 1 :: PAGE].long().contiguous()
