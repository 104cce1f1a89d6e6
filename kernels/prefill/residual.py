"""The residual: one query, without ReLU and without a gate, in the place of the heads that a row is not routed to."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_misa.kernels.checks import expect
from sglang_misa.kernels.layout import HEAD_DIM


@dataclass(frozen=True)
class Residual:
    """The column k_scale[l] · scale[t] · (query[t] · k[l]) of a row's scores, beside those of its routed heads.

    query [T, 128] fp8 e4m3; scale [T] fp32, positive; as `route` makes them.
    """

    query: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> Residual:
        """Room for the residuals of `rows` queries."""
        query = torch.empty(rows, HEAD_DIM, dtype=torch.uint8, device=device)
        return cls(query.view(torch.float8_e4m3fn), torch.empty(rows, dtype=torch.float32, device=device))

    def check(self, rows: int) -> None:
        """Raise ValueError unless both tensors are on a GPU in the layout above."""
        expect("residual.query", self.query, (rows, HEAD_DIM), torch.float8_e4m3fn, torch.uint8, cuda=True)
        expect("residual.scale", self.scale, (rows,), torch.float32, cuda=True)
