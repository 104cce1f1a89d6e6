"""SGLang's full CUDA graphs: decode shapes are captured with both selections, and a replay takes the right one.

The second variant costs one more graph of the same kernels: its activations lie in the memory pool that all graphs
share, so what it adds is the graph's own nodes, and the two warm-ups and one capture of each shape at start-up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from sglang_misa import decode_gate, runtime
from sglang_misa.audit import Taps
from sglang_misa.metrics import recorder
from sglang_misa.patches.forward_batch import step

STOCK = "misa-stock"


def stock_key(key: Any) -> Any:
    """The ShapeKey under which the stock variant of the graph at `key` is kept."""
    label = STOCK if key.variant_label is None else f"{key.variant_label}-{STOCK}"
    return dataclasses.replace(key, variant_label=label)


def capture_one(
    original: Callable[..., None], self: Any, shape_key: Any, forward_fn: Any, *args: Any, **kwargs: Any
) -> None:
    """FullCudaGraphBackend.capture_one: by the policy at the key itself, and once more with stock DSA.

    Graphs in which nothing asks the gate, such as prefill's, stay single.
    """
    with decode_gate.capturing(stock=False) as capture:
        original(self, shape_key, forward_fn, *args, **kwargs)
    _keep_taps(self, shape_key, capture)
    config = runtime.current().config
    # The least step; a shape has rows of padding.
    gated = decode_gate.Step([1]).why_under_gate(config.decoding) is not None
    if capture.asked and (gated or config.audit.floor > 0):
        with decode_gate.capturing(stock=True) as capture:
            original(self, stock_key(shape_key), forward_fn, *args, **kwargs)
        _keep_taps(self, stock_key(shape_key), capture)


def _keep_taps(backend: Any, shape_key: Any, capture: decode_gate.Capture) -> None:
    if capture.taps:
        config = runtime.current().config
        vars(backend).setdefault("misa_taps", {})[shape_key] = Taps(capture.taps, config.audit.every)


def replay(original: Callable[..., Any], self: Any, shape_key: Any, static_forward_batch: Any, **kwargs: Any) -> Any:
    """FullCudaGraphBackend.replay: the variant that the gate names for this batch's lengths on the host."""
    stock = stock_key(shape_key)
    if stock in self._graphs:
        config = runtime.current().config
        name, known = config.name("decode"), step(static_forward_batch)
        is_stock = decode_gate.why_stock(config.decoding, known) is not None
        recorder.replayed("dsa" if is_stock else f"{name}:unknown-length" if known is None else name)
        shape_key = stock if is_stock else shape_key
    result = original(self, shape_key, static_forward_batch, **kwargs)
    if taps := vars(self).get("misa_taps", {}).get(shape_key):
        taps.replayed()
    return result
