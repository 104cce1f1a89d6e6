"""One layer's selection: the gate splits rows between the policy and DSA, an engine selects, the audit looks.

Knows neither SGLang nor a kernel: `patches/indexer.py` brings the calls, `engines` does the work.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sglang_misa import audit
from sglang_misa.call import DecodeCall, ExtendCall, Run, Span
from sglang_misa.config import SelectionPolicy
from sglang_misa.engines import engine_for
from sglang_misa.runtime import Runtime

# All heads and tokens, selected by the engine itself: DSA for the rows of a call that a policy does not take.
DSA = SelectionPolicy(exact=True)


def runs(policy: SelectionPolicy, spans: Sequence[Span]) -> list[tuple[SelectionPolicy, Run]]:
    """The rows of a call in as few runs as can be, each with what selects them: `policy` or, under its gate, DSA."""
    result: list[tuple[SelectionPolicy, Run]] = []
    for span in spans:
        gate = span.gate(policy.min_len)
        for chosen, first, last in ((DSA, span.first_row, gate), (policy, gate, span.last_row)):
            if first == last:
                continue
            if result and result[-1][0] is chosen:
                run = result.pop()[1]
                result.append((chosen, Run((*run.spans, span), run.first, last)))
            else:
                result.append((chosen, Run((span,), first, last)))
    return result


class Selector:
    """What selects for the layers of one KV pool: its engine, its auditor and the policies."""

    def __init__(self, runtime: Runtime, index_k_pages: Sequence[Tensor]):
        """`index_k_pages`: the pool's index-K, uint8 [num_pages, 8448] a layer (0 rows without an indexer)."""
        self.config = runtime.config
        self.engine = engine_for(runtime, index_k_pages)
        self.auditor = audit.Auditor(runtime.config.audit, runtime.topk)

    def why_stock(self, layer: int, spans: Sequence[Span]) -> str | None:
        """The reason for which SGLang's own indexer takes a whole extend call, or None."""
        policy = self.config.prefill
        if not policy.active:
            return "policy-is-dsa"
        if layer in self.auditor.dense_layers:
            return "recall-floor"
        if all(span.length <= policy.min_len for span in spans):
            return "under-min-len"
        return None

    def extend(self, call: ExtendCall) -> None:
        """Select for all rows of `call` into its output. For a call that `why_stock` has no reason against."""
        policy = self.config.prefill
        chosen = runs(policy, call.spans)
        self.engine.extend(call, chosen)
        self.auditor.look_at_extend(call, [run for by, run in chosen if by is policy])

    def decode(self, call: DecodeCall) -> None:
        """Select for all rows of `call` into its `ids`."""
        self.engine.decode(call, self.config.decode)
        self.auditor.look_at_decode(call)
