"""SGLang's ForwardBatch: which steps should select by policy, and the lengths that the decode gate goes by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sglang_misa import runtime
from sglang_misa.decode_gate import Step
from sglang_misa.metrics import recorder
from sglang_misa.patches.pool import selector_of


def init_new(original: Callable[..., Any], cls: type, batch: Any, model_runner: Any, *args: Any, **kwargs: Any) -> Any:
    """ForwardBatch.init_new: the one point that every rank comes by once a step, where the ladders of recall meet.

    Adds `misa_step`, the lengths of its requests: from seq_lens_cpu, and without (speculative decoding under the
    overlap scheduler) from the requests, where what the last step accepted is not counted yet. Steps that a policy
    should select in are told to the recorder, which counts their selections too.
    """
    if (selector := selector_of(model_runner)) is not None:
        selector.ladders.stepped()
    result = original(cls, batch, model_runner, *args, **kwargs)
    global _prompt_lens, _step
    _prompt_lens = [request.seqlen for request in batch.reqs] if result.forward_mode.is_extend() else ()
    result.misa_step = _step = _known(result) or Step([request.seqlen for request in batch.reqs], _width(result))
    _tell(result.forward_mode, _step)
    return result


def _known(batch: Any) -> Step | None:
    """The step of a batch that has its lengths on the host, and is one: several draft layers replay by a spec input."""
    lengths = getattr(batch, "seq_lens_cpu", None) if hasattr(batch, "forward_mode") else None
    return None if lengths is None else Step(lengths.tolist(), _width(batch))


def _width(batch: Any) -> int:
    """Rows of each request of a batch."""
    verified = batch.forward_mode.is_target_verify() or batch.forward_mode.is_draft_extend_v2()
    return max(1, getattr(batch.spec_info, "num_tokens_per_req", 1)) if verified else 1


def _tell(mode: Any, step: Step) -> None:
    """Tell the recorder of a step that a policy should select in."""
    armed = runtime.current()
    if step.longest <= armed.topk:
        return
    if mode.is_extend_without_speculative():
        gate = armed.config.gate("prefill")
        if gate is not None and step.longest > gate:
            recorder.stepped("prefill")
    elif mode.is_decode() or mode.is_target_verify():
        policy = armed.config.decoding
        if policy.active and step.why_under_gate(policy) is None:
            recorder.stepped("decode")


_step: Step | None = None  # of the batch made last: SGLang's runners may run a copy, which has no `misa_step`
_prompt_lens: Sequence[int] = ()  # no attribute of the batch, of which SGLang's runners may make copies


def prompt_lens() -> Sequence[int]:
    """Tokens of each prompt in the batch made last, which is the one that runs; nothing in a decode step."""
    return _prompt_lens


def step(batch: Any) -> Step | None:
    """The requests of a step, as the host knows them; None where it does not."""
    return getattr(batch, "misa_step", None) or _known(batch) or _step
