"""One layer's selection: the gate splits rows between the policy and DSA, an engine selects, audit and dump look.

Knows neither SGLang nor a kernel: `patches/indexer.py` brings the calls, `engines` does the work.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from torch import Tensor

from sglang_misa import audit, decode_gate
from sglang_misa.agreement import agreement_for
from sglang_misa.call import DecodeCall, ExtendCall, Run, Span
from sglang_misa.config import Audit
from sglang_misa.dump import dump_for
from sglang_misa.engines import engine_for
from sglang_misa.ladder import Ladders
from sglang_misa.metrics import recorder
from sglang_misa.policy import EXACT, Phase, SelectionPolicy
from sglang_misa.runtime import Runtime


def runs(policy: SelectionPolicy, spans: tuple[Span, ...]) -> list[tuple[SelectionPolicy, Run]]:
    """The rows of a call with what selects them: DSA under the gate of `policy` and in its tail, else `policy`."""
    under, own, tails = _parts(spans, policy.min_len, policy.tail)
    return [(by, run) for by, run in ((EXACT, under), (policy, own), (EXACT, tails)) if run.ranges]


@functools.lru_cache(maxsize=8)  # all layers of a step ask for the same
def _parts(spans: tuple[Span, ...], min_len: int, tail: int) -> tuple[Run, Run, Run]:
    """`Span.parts` of all spans."""
    under, own, tails = zip(*(span.parts(min_len, tail) for span in spans), strict=True)
    return Run.of(spans, under), Run.of(spans, own), Run.of(spans, tails)


class Selector:
    """What selects for the layers of one KV pool: an engine by each layer's policy. And those who look at it."""

    def __init__(self, runtime: Runtime, index_k_pages: Sequence[Tensor]):
        """`index_k_pages`: the pool's index-K, uint8 [num_pages, 8448] a layer (0 rows without an indexer)."""
        config, layers = runtime.config, len(index_k_pages)
        is_target = runtime.is_target(layers)
        self._row_len = runtime.row_len
        self.ladders = Ladders(
            config,
            [layer if is_target else None for layer in range(layers)],
            index_heads=runtime.index_heads,
            topk=runtime.topk,
            peers=runtime.peers,
        )
        # Neither canary nor audit look at a draft model's pool, whose layers would count as the target's.
        self.engine = engine_for(runtime, index_k_pages, keeps=self.ladders.decodes and is_target)
        audited = config.audit if is_target else Audit()
        self.auditor = audit.Auditor(audited, runtime.topk, self.engine, self.ladders)
        self.dump = dump_for(runtime, index_k_pages)
        self.agreement = agreement_for(runtime, self.engine)

    def policy(self, phase: Phase, layer: int) -> SelectionPolicy:
        """What selects in `layer` now, past the length gate."""
        return self.ladders.policy(phase, layer)

    def why_stock(self, layer: int, spans: tuple[Span, ...]) -> str | None:
        """The reason for which SGLang's own indexer takes a whole extend call, or None."""
        policy = self.policy("prefill", layer)
        if not policy.active:
            return "recall-floor" if self.ladders.sunk(layer) else "policy-is-dsa"
        past = sum(span.length > policy.min_len for span in spans)
        if not past:
            return "under-min-len"
        if len(_parts(spans, policy.min_len, policy.tail)[1]) < self.engine.least_rows * past:
            return "few-rows"
        return None

    def why_stock_decodes(self, layer: int, rows: int, step: decode_gate.Step | None) -> str | None:
        """The reason for which stock DSA takes a decode call of `rows` rows, padding among them, or None.

        step: what the host knows of its requests.
        """
        policy = self.policy("decode", layer)
        if not policy.active:
            return "policy-is-dsa"
        longest = decode_gate.Step([self._row_len], width=rows)
        return decode_gate.why_stock(policy, step, always=longest.why_under_gate(policy))

    def extend(self, call: ExtendCall) -> None:
        """Select for all rows of `call` into its output. For a call that `why_stock` has no reason against."""
        policy = self.policy("prefill", call.layer)
        chosen = runs(policy, call.spans)
        self.engine.extend(call, chosen)
        self._agree(call.layer, call.output.ids)
        recorder.selected(len(call.output.ids))
        for by, run in chosen:
            if by is policy:
                self.auditor.look_at_extend(call, run)
        if self.dump is not None:
            self.dump.take(call)

    def left_to_stock(self, layer: int, spans: tuple[Span, ...], call: Callable[[], ExtendCall]) -> None:
        """Look at an extend call that stock DSA selected for; `call` makes it, if there is anything to see."""
        probe = self.ladders.probe("prefill", layer)
        if probe is not None and self.auditor.due("prefill", layer):
            for by, run in runs(probe, spans):
                if by is probe:
                    self.auditor.probe_extend(call(), probe, run)
        if self.dump is not None and self.dump.wants(layer, spans):
            self.dump.take(call())

    def decode_left_to_stock(self, call: Callable[[], DecodeCall]) -> None:
        """Look at a decode call that stock DSA selected for, past the gate or not; `call` makes it."""
        if self.ladders.floor > 0:
            self.auditor.look_past_decode(call())

    def decode(self, call: DecodeCall) -> None:
        """Select for all rows of `call` into its `ids`."""
        self.engine.decode(call, self.policy("decode", call.layer))
        self._agree(call.layer, call.ids)
        self.auditor.look_at_decode(call)

    def _agree(self, layer: int, ids: Tensor) -> None:
        if self.agreement is not None:
            self.agreement.selected(layer, ids)
