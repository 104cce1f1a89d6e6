"""SGLang's KV pool: page means beside the index-K pages, and their place in the memory budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from sglang_misa import plugin
from sglang_misa.block_stats import BlockStats
from sglang_misa.config import PAGE
from sglang_misa.metrics import recorder


def init(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """DSATokenToKVPool.__init__: the pool owns the means of its pages, as `misa_block_stats`."""
    original(self, *args, **kwargs)
    self.misa_block_stats = BlockStats(self.index_k_with_scale_buffer, kernels=plugin.runtime().kernels)
    recorder.block_stats_bytes += self.misa_block_stats.nbytes


def compute_cell_size(original: Callable[..., int], self: Any, runner: Any, num_layers: int) -> int:
    """DefaultPoolConfigurator._compute_cell_size: bytes of a token over all layers, its share of page means too."""
    return original(self, runner, num_layers) + math.ceil(BlockStats.bytes_per_page() / PAGE) * num_layers
