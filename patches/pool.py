"""SGLang's KV pool: page means beside the index-K pages, and their place in the memory budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from sglang_misa import runtime
from sglang_misa.kernels.layout import PAGE
from sglang_misa.metrics import recorder
from sglang_misa.page_stats import PageStats


def init(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """DSATokenToKVPool.__init__: the pool owns the means of its pages, as `misa_page_stats`."""
    original(self, *args, **kwargs)
    self.misa_page_stats = PageStats(self.index_k_with_scale_buffer, kernels=runtime.current().kernels)
    recorder.page_stats_bytes += self.misa_page_stats.nbytes


def compute_cell_size(original: Callable[..., int], self: Any, runner: Any, num_layers: int) -> int:
    """DefaultPoolConfigurator._compute_cell_size: bytes of a token over all layers, its share of page means too."""
    return original(self, runner, num_layers) + math.ceil(PageStats.bytes_per_page() / PAGE) * num_layers
