"""The structs that the host hands to the CUDA kernels, field by field as csrc/ declares them.

tests/kernels/test_structs.py compiles both sides against each other.
"""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar

import torch

Pointer, Int, Long = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class Struct(ctypes.Structure):
    """A C struct by the names of its fields, all of which are given, in their order.

    A tensor gives its address, None is null. It holds no tensor: keep them until the launch.
    """

    sources: ClassVar[tuple[str, ...]]  # of csrc/sm90 that take it; the struct's name there is the class's
    names: ClassVar[list[str]]  # of its fields

    def __init_subclass__(cls) -> None:
        cls.names = [field[0] for field in cls._fields_]

    def __init__(self, **fields: Any):
        if list(fields) != self.names:
            raise TypeError(f"{type(self).__name__}: expected fields {self.names}, got {list(fields)}")
        super().__init__(*[v.data_ptr() if isinstance(v, torch.Tensor) else v for v in fields.values()])


class ResidualColumn(Struct):
    """The column of the heads that are not routed."""

    sources = ("topk_routed", "topk_reranked")
    _fields_ = (("query", Pointer), ("scale", Pointer))


class Inputs(Struct):
    """A prefill call's query rows, keys, and each row's window of them."""

    sources = ("topk_routed", "topk_reranked", "topk_blocks")
    _fields_ = (
        ("index_q", Pointer),
        ("head_gates", Pointer),
        ("head_ids", Pointer),
        ("index_k", Pointer),
        ("k_scale", Pointer),
        ("ks", Pointer),
        ("ke", Pointer),
        ("residual", ResidualColumn),
        ("rows", Int),
        ("index_heads", Int),
        ("keys", Int),
    )


class Output(Struct):
    """Where chosen keys go, and what stands for one."""

    sources = ("topk_routed", "topk_reranked", "topk_blocks")
    _fields_ = (
        ("out", Pointer),
        ("k", Int),
        ("page_table", Pointer),
        ("row_batch", Pointer),
        ("page_pitch", Long),
        ("offsets", Pointer),
    )


class Failed(Struct):
    """The rows to be redone: where their list and its counters are."""

    sources = ("topk_routed", "topk_reranked")
    _fields_ = (("list", Pointer), ("meeting", Pointer), ("ever", Pointer), ("at_once", Int))


class Sample(Struct):
    """Room for the sampled keys."""

    sources = ("topk_routed", "topk_reranked")
    _fields_ = (("keys", Pointer), ("scale", Pointer), ("stride", Int))


class RoutedPlan(Struct):
    """The division of a `topk_routed` call, and where its scratch is."""

    sources = ("topk_routed",)
    _fields_ = (
        ("rows", Int),
        ("workers", Int),
        ("runs", Int),
        ("buffers", Int),
        ("rank", Int),
        ("spare", Int),
        ("entries", Int),
        ("room", Int),
        ("sampled", Int),
        ("ld", Int),
        ("failed", Failed),
        ("sample", Sample),
        ("thresholds", Pointer),
        ("division", Pointer),
        ("counts", Pointer),
        ("bulk", Pointer),
    )


class RerankedPlan(Struct):
    """The division of a `topk_reranked` call, and where its scratch is."""

    sources = ("topk_reranked",)
    _fields_ = (
        ("rows", Int),
        ("workers", Int),
        ("rank", Int),
        ("candidates", Int),
        ("room", Int),
        ("pitch", Int),
        ("sampled", Long),
        ("ld", Long),
        ("failed", Failed),
        ("sample", Sample),
        ("thresholds", Pointer),
        ("spans", Pointer),
        ("division", Pointer),
        ("marks", Pointer),
        ("scores", Pointer),
    )


class BlockChoice(Struct):
    """The blocks of tokens that a row keeps."""

    sources = ("topk_blocks",)
    _fields_ = (("scores", Pointer), ("pitch", Long), ("size", Int), ("kept", Int), ("room", Int))


class Route(Struct):
    """One call of the router."""

    sources = ("route",)
    _fields_ = (
        ("index_q", Pointer),
        ("head_gates", Pointer),
        ("block_means", Pointer),
        ("row_batch", Pointer),
        ("row_len", Pointer),
        ("head_ids", Pointer),
        ("residual_gates", Pointer),
        ("residual_query", Pointer),
        ("residual_scale", Pointer),
        ("products", Pointer),
        ("rows", Int),
        ("requests", Int),
        ("max_blocks", Int),
        ("block_size", Int),
        ("heads", Int),
        ("router", Int),
    )


class ChooseHeads(Struct):
    """One choice of heads by what a residual gets wrong of them."""

    sources = ("choose_heads",)
    _fields_ = (
        ("index_q", Pointer),
        ("head_gates", Pointer),
        ("row_len", Pointer),
        ("products", Pointer),
        ("direction", Pointer),
        ("head_ids", Pointer),
        ("residual_query", Pointer),
        ("residual_scale", Pointer),
        ("rows", Int),
        ("max_blocks", Int),
        ("block_size", Int),
        ("heads", Int),
    )


class PageRoute(Struct):
    """One choice of columns over page means."""

    sources = ("sketch_route",)
    _fields_ = (
        ("index_q", Pointer),
        ("head_gates", Pointer),
        ("means", Pointer),
        ("pages", Pointer),
        ("lens", Pointer),
        ("queries", Pointer),
        ("gates", Pointer),
        ("pitch", Long),
        ("heads", Int),
        ("router", Int),
        ("residual", Int),
        ("candidates", Int),
    )


class Scan(Struct):
    """One scan of sketched keys."""

    sources = ("sketch_scan",)
    _fields_ = (
        ("queries", Pointer),
        ("gates", Pointer),
        ("means", Pointer),
        ("sketches", Pointer),
        ("pages", Pointer),
        ("lens", Pointer),
        ("scores", Pointer),
        ("pitch", Long),
        ("room", Long),
        ("columns", Int),
        ("residual", Int),
        ("candidates", Int),
        ("span", Int),
        ("blocks", Int),
    )


class Candidates(Struct):
    """One listing of candidates."""

    sources = ("sketch_candidates",)
    _fields_ = (("scores", Pointer), ("lens", Pointer), ("positions", Pointer), ("room", Long), ("candidates", Int))


class Rescore(Struct):
    """All-head scores of listed candidates."""

    sources = ("sketch_rescore",)
    _fields_ = (
        ("index_q", Pointer),
        ("head_gates", Pointer),
        ("index_k_pages", Pointer),
        ("pages", Pointer),
        ("lens", Pointer),
        ("positions", Pointer),
        ("logits", Pointer),
        ("pitch", Long),
        ("candidates", Int),
        ("topk", Int),
        ("span", Int),
        ("blocks", Int),
    )


class Kept(Struct):
    """Scored tokens of whole pages."""

    sources = ("topk_kept",)
    _fields_ = (("pages", Pointer), ("blocks", Pointer), ("room", Int), ("block", Int))


class Listed(Struct):
    """Scored tokens at listed positions."""

    sources = ("topk_kept",)
    _fields_ = (("positions", Pointer), ("table", Pointer), ("pitch", Long), ("room", Int))


class Scored(Struct):
    """The scores of a decode step's rows, and where their best k go."""

    sources = ("topk_kept",)
    _fields_ = (("scores", Pointer), ("lens", Pointer), ("slots", Pointer), ("positions", Pointer), ("k", Int))
