"""The quantiser of page sketches: the kernels' bits are the reference's, and what a sketch keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sglang_misa import reference_pages
from sglang_misa.kernels.decode.scan_sketches import unpack
from sglang_misa.kernels.layout import HEAD_DIM, PAGE, SKETCH_BITS, sketch_bytes
from sglang_misa.kernels.page_means import Kept, Layers, update_last_page_means, update_page_means, update_slots


def index_k_pages(n: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    keys = (torch.randn(n, PAGE * HEAD_DIM, generator=random) * 2).to(torch.float8_e4m3fn).view(torch.uint8)
    scales = torch.rand(n, PAGE, generator=random).add_(0.5)
    return torch.cat([keys, scales.view(torch.uint8)], 1)


def hostile_pages() -> Tensor:
    """Whole pages of: random keys, one NaN scale, one NaN key, a zero key, one key 64 times, keys whose squares
    overflow, scales of zero, negative and tiny scales."""
    pages = index_k_pages(8)
    keys, scales = pages[:, : PAGE * HEAD_DIM].view(8, PAGE, HEAD_DIM), pages[:, PAGE * HEAD_DIM :].view(torch.float32)
    scales[1, 3] = torch.nan
    keys[2, 5, 7] = 0x7F
    keys[3, 9] = 0
    keys[4] = keys[4, :1].clone()
    scales[4] = 1
    scales[5] *= 1e20
    scales[6] = 0
    scales[7] = torch.linspace(-1, 1, PAGE) * 2.0**-120
    return pages


class TestQuantiser:
    @pytest.mark.parametrize("bits", SKETCH_BITS)
    def test_kernels_write_the_bits_of_the_reference(self, device: str, bits: int) -> None:
        """At extend, for written slots and for the newest page, and never a page that is not complete."""
        pages = hostile_pages().to(device)
        n = len(pages)
        table = torch.tensor([[3, 1, 0, -7], [6, 5, 4, 2], [7, 2**30, -1, 9]], dtype=torch.int32, device=device)
        lens = torch.tensor([3 * PAGE, 3 * PAGE + 63, PAGE], dtype=torch.int32, device=device)
        slots = torch.tensor([0, -1, *range(PAGE - 1, (n - 1) * PAGE, PAGE)], device=device)
        slots = slots[slots // PAGE != 2]
        updates = {
            "extend": lambda m, s: update_page_means(pages, m, table, lens, s),
            "slots": lambda m, s: update_slots(pages, m, slots, s),
            "newest": lambda m, s: update_last_page_means(Layers.of([pages], [m], [s]), table, lens),
        }
        written = {"extend": {0, 1, 3, 4, 5, 6, 7}, "slots": {0, 1, 3, 4, 5, 6}, "newest": {0, 7}}
        for name, update in updates.items():
            means = torch.full((n, HEAD_DIM), 7.0, dtype=torch.bfloat16, device=device)
            sketches = torch.full((n, sketch_bytes(bits)), 0xA5, dtype=torch.uint8, device=device)
            update(means, sketches)
            for page in range(n):
                if page not in written[name]:
                    assert (means[page] == 7).all(), (name, page)
                    assert (sketches[page] == 0xA5).all(), (name, page)
                    continue
                codes, scales = reference_pages.quantize_pages(pages[page, None], means[page, None], bits)
                own = unpack(sketches[page, None].cpu(), bits)
                assert torch.equal(own[0], codes.cpu()), (name, page)
                assert torch.equal(own[1].view(torch.int16), scales.cpu().view(torch.int16)), (name, page)

    @pytest.mark.parametrize("bits", SKETCH_BITS)
    def test_kept_pages_stay_as_they_are(self, device: str, bits: int) -> None:
        pages = hostile_pages().to(device)
        table = torch.tensor([[3, 1, 0, 4, 6], [7, 5, 2, -1, -1]], dtype=torch.int32, device=device)
        lens = torch.tensor([5 * PAGE + 1, 2 * PAGE], dtype=torch.int32, device=device)
        for kept in ([0, 0], [3, 1], [5, 2], [4, 9]):
            means = torch.full((len(pages), HEAD_DIM), 7.0, dtype=torch.bfloat16, device=device)
            sketches = torch.full((len(pages), sketch_bytes(bits)), 0xA5, dtype=torch.uint8, device=device)
            most = max(n - k for n, k in zip((5, 2), kept, strict=True))
            update_page_means(
                pages, means, table, lens, sketches, Kept(torch.tensor(kept, dtype=torch.int32, device=device), most)
            )
            new = {p for row, n in enumerate((5, 2)) for p in table[row, kept[row] : n].tolist()}
            assert {*(sketches != 0xA5).any(1).nonzero().flatten().tolist()} == new
            assert {*(means != 7).any(1).nonzero().flatten().tolist()} == new

    @pytest.mark.parametrize("bits", SKETCH_BITS)
    def test_a_broken_key_stays_in_its_page(self, bits: int) -> None:
        pages = hostile_pages()
        means = reference_pages.page_means(pages).bfloat16()
        codes, scales = reference_pages.quantize_pages(pages, means, bits)
        assert torch.isfinite(scales.float()).all()
        for page in (1, 2):
            assert not codes[page].any()
            assert not scales[page].any()
        keys = reference_pages.sketched_keys(codes, scales, means, bits)
        assert torch.isfinite(keys[[0, 3, 4, 6, 7]]).all()
        assert torch.equal(keys[4, 0], means[4].float())  # equal keys have no residual but the mean's rounding

    @pytest.mark.parametrize(("bits", "error"), [(1, 0.64), (2, 0.145)])
    def test_sketches_keep_inner_products_and_lose_what_levels_must(self, bits: int, error: float) -> None:
        """⟨r, r̂⟩ = ‖r‖² within bf16; of a Gaussian the rest is π/2 - 1 with one bit, 0.1188 / 0.8812 with two."""
        pages = index_k_pages(16)
        means = reference_pages.page_means(pages).bfloat16()
        keys = reference_pages.sketched_keys(*reference_pages.quantize_pages(pages, means, bits), means, bits)
        truth, sketch = (x - means.float().unsqueeze(1) for x in (reference_pages.dequantize_pages(pages), keys))
        energy = truth.square().sum(-1)
        torch.testing.assert_close((truth * sketch).sum(-1), energy, rtol=2**-8, atol=0)
        assert ((truth - sketch).square().sum(-1) / energy).mean() < error
