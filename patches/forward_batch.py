"""SGLang's ForwardBatch: which steps should select by policy, and the length that the decode gate goes by."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from sglang_misa import runtime
from sglang_misa.metrics import recorder


def init_new(original: Callable[..., Any], cls: type, batch: Any, model_runner: Any, *args: Any, **kwargs: Any) -> Any:
    """ForwardBatch.init_new: the one point that every rank comes by once a step, where the ladders of recall meet.

    Adds `misa_longest`, the tokens of its longest request, to a batch without seq_lens_cpu: that is speculative
    decoding under the overlap scheduler, and what the last step accepted is not counted yet. Steps with more tokens
    than the top-k are told to the recorder, which counts their selections too.
    """
    selector = getattr(model_runner.token_to_kv_pool, "misa_selector", None)
    if selector is not None:  # a draft model may have a pool without index keys
        selector.ladders.stepped()
    result = original(cls, batch, model_runner, *args, **kwargs)
    global _ends
    _ends = ()
    if result.forward_mode.is_extend() and result.seq_lens_cpu is not None:
        pairs = zip(batch.reqs, result.seq_lens_cpu.tolist(), strict=False)  # a padded batch has more lengths
        _ends = {number for number, (request, seen) in enumerate(pairs) if seen >= request.seqlen}
    if result.seq_lens_cpu is None:
        global _longest
        result.misa_longest = _longest = max((request.seqlen for request in batch.reqs), default=0)
    tokens, mode = longest(result), result.forward_mode
    if tokens is not None and tokens > runtime.current().topk:
        if mode.is_extend():
            recorder.stepped("prefill", tokens)
        elif (mode.is_decode() or mode.is_target_verify()) and result.batch_size >= runtime.current().config.min_rows:
            recorder.stepped("decode", tokens)
    return result


_longest: int | None = None  # of the batch made last: SGLang's runners may run a copy, which has no `misa_longest`
_ends: Collection[int] = ()  # no attribute of the batch, of which SGLang's runners may make copies


def ends() -> Collection[int]:
    """The requests of the batch made last, which is the one that runs, whose prompt ends in it."""
    return _ends


def longest(batch: Any) -> int | None:
    """Tokens of the longest request of a step, as the host knows them; None where it does not."""
    lengths = getattr(batch, "seq_lens_cpu", None)
    return getattr(batch, "misa_longest", _longest) if lengths is None else max(lengths.tolist(), default=0)
