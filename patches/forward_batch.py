"""SGLang's ForwardBatch: which steps should select by policy, and the length that the decode gate goes by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_misa import runtime
from sglang_misa.metrics import recorder


def init_new(original: Callable[..., Any], cls: type, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """ForwardBatch.init_new: adds `misa_longest`, the tokens of its longest request, to a batch without seq_lens_cpu.

    That is speculative decoding under the overlap scheduler: what the last step accepted is not counted yet. Steps with
    more tokens than the top-k are told to the recorder, which counts their selections too.
    """
    result = original(cls, batch, *args, **kwargs)
    if result.seq_lens_cpu is None:
        result.misa_longest = max((request.seqlen for request in batch.reqs), default=0)
    tokens, mode = longest(result), result.forward_mode
    if tokens is not None and tokens > runtime.current().topk:
        if mode.is_extend():
            recorder.stepped("prefill", tokens)
        elif mode.is_decode() or mode.is_target_verify():
            recorder.stepped("decode", tokens)
    return result


def longest(batch: Any) -> int | None:
    """Tokens of the longest request of a step, as the host knows them; None where it does not."""
    lengths = getattr(batch, "seq_lens_cpu", None)
    return getattr(batch, "misa_longest", None) if lengths is None else max(lengths.tolist(), default=0)
