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
    """Drawn pages, integer [n] on the device; n = 0 for a step without requests."""

    pages: Tensor  # physical page ids, -1 where there are fewer than were asked for
    rows: Tensor  # of the step: whose page it is

    def where_drawn(self) -> Tensor:
        """The ids int64 of the pages drawn. Waits for the device."""
        return self.pages[self.pages >= 0].long()


class PageSampler:
    """Draws `size` complete pages of a step, each as likely as another; all of them where there are no more.

    Samplers whose numbers have one seed draw alike, in all ranks. Whoever draws something else beside the pages takes
    it from the same numbers: two generators of one seed go together. Nothing waits for the device.
    """

    def __init__(self, size: int, numbers: random.Random):
        self.size, self._random = size, numbers

    def draw(self, req_to_token: Tensor, req_ids: Tensor, seq_lens: Tensor) -> PageSample:
        """A sample of a step.

        req_to_token [R, L] integer: SGLang's slots of each request's tokens; req_ids [B], seq_lens [B]: rows of it and
        tokens stored, of the step's requests. A page that two of them share counts twice.
        """
        device, first = req_to_token.device, self._random.randrange(_PARTS)
        if not len(req_ids):
            none = torch.empty(0, dtype=torch.int64, device=device)
            return PageSample(none, none)
        complete = seq_lens // PAGE
        ends = complete.cumsum(0)
        # Evenly spaced over all pages, laid end to end: no page twice unless there are fewer than asked for. The place
        # before the first lies in front of them all.
        parts = torch.arange(first - _PARTS, first + self.size * _PARTS, _PARTS, device=device)
        places = parts * ends[-1] // (self.size * _PARTS)
        place = places[1:]
        rows = torch.searchsorted(ends[:-1], place, right=True)
        logical = place - (ends - complete)[rows]
        pages = req_to_token[:, ::PAGE][req_ids[rows].long(), logical] // PAGE
        return PageSample(torch.where(place > places[:-1], pages, -1), rows)
