"""`--enable-return-indexer-topk` on the CPU: SGLang allows it on CUDA alone and pins the host memory."""

from __future__ import annotations

from typing import Any

import torch


def create_indexer_capturer(
    *, model_config: Any, num_tokens: int, max_running_requests: int, device: str
) -> Any | None:
    """SGLang's capturer of selected positions, or None when not enabled.

    Mirrors sglang.srt.state_capturer.indexer_topk.create_indexer_capturer without its refusal of other devices.
    """
    from sglang.srt.configs.model_config import get_num_indexer_layers
    from sglang.srt.runtime_context import get_exec
    from sglang.srt.state_capturer.indexer_topk import _create_indexer_capturer_raw

    config = model_config.hf_text_config
    return _create_indexer_capturer_raw(
        enable=get_exec().features.enable_return_indexer_topk,
        num_indexer_layers=get_num_indexer_layers(config),
        index_topk=getattr(config, "index_topk", 0),
        num_tokens=num_tokens,
        max_running_requests=max_running_requests,
        device=device,
    )


def init_host_cache(
    self: Any, num_tokens: int, num_layers: int, topk_size: int, name: str, device: str = "cpu"
) -> None:
    """Pageable buffer [num_tokens, num_layers, topk_size] int32. Mirrors state_capturer.base.BaseHostCache.__init__."""
    self.buffer = torch.zeros((num_tokens, num_layers, topk_size), dtype=torch.int32)
    self.num_tokens, self.num_layers, self.topk_size, self.name = num_tokens, num_layers, topk_size, name
    self._log_allocation()
