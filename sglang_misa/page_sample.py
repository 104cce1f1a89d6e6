"""A random sample of the pages of one step's requests: those that are complete, and so have statistics."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_misa.kernels.layout import PAGE

_PARTS = 1 << 20  # places of the first page drawn, between two of them


@dataclass(frozen=True)
class PageSample:
    """Drawn pages, as int64 [n] and bool [n] on the device, n = 0 for a step without requests."""

    pages: Tensor  # physical page ids; 0 where not drawn
    rows: Tensor  # of the step: whose page it is
    drawn: Tensor  # False where there are fewer pages than were asked for

    def where_drawn(self) -> Tensor:
        """The ids of the pages drawn. Waits for the device."""
        return self.pages[self.drawn]


class PageSampler:
    """Draws `size` complete pages of a step, each as likely as another; all of them where there are no more.

    Samplers of one seed draw alike, in all ranks. Nothing waits for the device.
    """

    def __init__(self, size: int, seed: int = 0):
        self.size = size
        self._random = random.Random(seed)

    def draw(self, req_to_token: Tensor, req_ids: Tensor, seq_lens: Tensor) -> PageSample:
        """A sample of a step.

        req_to_token [R, L] integer: SGLang's slots of each request's tokens; req_ids [B], seq_lens [B]: rows of it and
        tokens stored, of the step's requests. A page that two of them share counts twice.
        """
        device, first = req_to_token.device, self._random.randrange(_PARTS)
        if not len(req_ids):
            none = torch.empty(0, dtype=torch.int64, device=device)
            return PageSample(none, none, none.bool())
        complete = seq_lens.long() // PAGE
        ends = complete.cumsum(0)
        # Evenly spaced over all pages, laid end to end: no page twice unless there are fewer than asked for. The place
        # before the first lies in front of them all.
        parts = torch.arange(first - _PARTS, first + self.size * _PARTS, _PARTS, device=device)
        place = parts * ends[-1] // (self.size * _PARTS)
        drawn = place[1:] > place[:-1]
        place = place[1:]
        rows = torch.searchsorted(ends, place, right=True).clamp(max=len(ends) - 1)
        position = (place - (ends - complete)[rows]) * PAGE
        pages = torch.where(drawn, req_to_token[req_ids[rows].long(), position].long() // PAGE, 0)
        return PageSample(pages, rows, drawn)
