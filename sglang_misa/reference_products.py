"""What the reference knows of heads by their products with a row's blocks: moments, and a residual's part of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sglang_misa.kernels.layout import SPREAD, TILT


class Products(NamedTuple):
    """A row's products with its blocks, and their moments; {-inf, 0} where those are not finite."""

    dots: Tensor  # [N, T, H, M], 0 where not seen
    seen: Tensor  # [N, T, 1, M]
    mean: Tensor  # [N, T, H]
    deviation: Tensor  # [N, T, H]

    @classmethod
    def of(cls, dots: Tensor, seen: Tensor) -> Products:
        count = seen.sum(-1).clamp_min(1)
        mean = dots.sum(-1) / count
        variance = ((dots - mean.unsqueeze(-1)) ** 2).masked_fill_(~seen, 0.0).sum(-1) / count
        finite = torch.isfinite(mean) & torch.isfinite(variance)
        return cls(dots, seen, torch.where(finite, mean, -torch.inf), torch.where(finite, variance, 0.0).sqrt())

    def tilted(self, scores: Tensor) -> Products:
        """The same of the blocks that score high by `scores` [N, T, 1, M]."""
        count = self.seen.sum(-1).clamp_min(1)
        scores = torch.where(self.seen & scores.isfinite(), scores, 0.0)
        scores = (scores - (scores.sum(-1) / count).unsqueeze(-1)).masked_fill_(~self.seen, 0.0)
        amount = TILT / (count * (scores.square().sum(-1) / count).sqrt())
        # Without their own mean too, or scores that are equal but for rounding would shift it by any amount.
        shift = amount * ((self.dots - self.mean.unsqueeze(-1)) * scores).sum(-1)
        wanted = (self.deviation > 0) & (amount > 0) & amount.isfinite()
        return self._replace(mean=self.mean + torch.where(wanted, shift, 0.0))

    def linear_part(self) -> tuple[Tensor, Tensor]:
        """φ = Φ(μ/σ), and the error σ'·√(φ'(1 − φ')) with σ' = max(σ, SPREAD·|μ|) and φ' = Φ(μ/σ'), each [N, T, H]."""
        known = normal_share(self.mean / self.deviation)
        share = torch.where(self.deviation > 0, known, (self.mean.sign() + 1) / 2)
        spread = torch.maximum(self.deviation, self.mean.abs() * SPREAD)
        tail = normal_share(-(self.mean / spread).abs())
        error = spread * (tail * (1 - tail)).sqrt()
        return share, torch.where((spread > 0) & spread.isfinite(), error, 0.0)


def normal_share(z: Tensor) -> Tensor:
    """Φ(z), exact in its lower tail too, where `torch.special.ndtr` is 0 from -5.5 on in fp32."""
    return torch.special.erfc(z * -(0.5**0.5)) / 2
