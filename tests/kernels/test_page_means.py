"""Page means against plain fp32 PyTorch, on pools whose unused parts are hostile."""

import pytest
import torch
from pools import reference_runtime

from sglang_misa import reference
from sglang_misa.config import MisaConfig
from sglang_misa.engines.kernels import KernelEngine
from sglang_misa.engines.reference import ReferenceEngine
from sglang_misa.kernels.layout import HEAD_DIM, PAGE
from sglang_misa.kernels.page_means import Layers, update_last_page_means, update_page_means, update_slots
from sglang_misa.kernels.prefill.block_means import block_means
from sglang_misa.runtime import Runtime

POISON = 7.0  # a bf16 value that no mean below takes: marks entries that must stay as they were
LENGTHS = [0, 1, 63, 64, 65, 127, 128, 2047, 2048, 2049]


def naive_page_means(pool: torch.Tensor) -> torch.Tensor:
    """fp32 mean of the dequantised keys of every page of a pool [P, 8448]."""
    keys = pool[:, : PAGE * HEAD_DIM].view(torch.float8_e4m3fn).float().view(-1, PAGE, HEAD_DIM)
    scales = pool[:, PAGE * HEAD_DIM :].contiguous().view(torch.float32)
    return (keys * scales[:, :, None]).mean(1)


def make_pool(pages: int, device: str, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    keys = (torch.randn(pages, PAGE * HEAD_DIM, generator=rng) + 1.0).to(torch.float8_e4m3fn).view(torch.uint8)
    scales = torch.rand(pages, PAGE, generator=rng).add_(0.5).view(torch.uint8)
    return torch.cat([keys, scales], 1).to(device)


def make_table(lengths: list[int], device: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A shuffled page table whose entries beyond each row's last page are hostile; lengths; pages in the pool."""
    used = [-(-n // PAGE) for n in lengths]
    ids = torch.randperm(sum(used) + 3, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    table = torch.tensor([-(2**31), -1, 2**31 - 1, 114514], dtype=torch.int32).repeat(len(lengths), max(used) // 4 + 1)
    for row, count in enumerate(used):
        table[row, :count] = ids[sum(used[:row]) : sum(used[: row + 1])]
    return table.to(device), torch.tensor(lengths, dtype=torch.int32, device=device), len(ids)


def assert_means(means: torch.Tensor, pool: torch.Tensor, written: set[int]) -> None:
    """Pages in `written` hold the naive mean within bf16 rounding, all others are untouched."""
    mask = torch.zeros(len(means), dtype=torch.bool)
    mask[sorted(written)] = True
    torch.testing.assert_close(means.cpu()[mask].float(), naive_page_means(pool.cpu())[mask], rtol=2**-7, atol=1e-6)
    assert (means.cpu()[~mask] == POISON).all()


def complete_pages(table: torch.Tensor, lengths: list[int]) -> list[list[int]]:
    """The complete pages of each row, in order."""
    return [table[row, : n // PAGE].tolist() for row, n in enumerate(lengths)]


@pytest.mark.parametrize("block_size", [64, 192, 256, 2048, 4096])
def test_complete_pages_and_complete_blocks_are_written(device: str, block_size: int) -> None:
    table, lens, pages = make_table(LENGTHS, device)
    pool, means = make_pool(pages, device), torch.full((pages, HEAD_DIM), POISON, dtype=torch.bfloat16, device=device)
    complete = complete_pages(table, LENGTHS)
    written = {page for row in complete for page in row}
    freed = [p for p in range(pages) if p not in written]
    pool[freed] = 0xFF  # NaN keys and NaN scales, in unfinished and in free pages

    update_page_means(pool, means, table, lens)
    blocks = block_means(means, table, lens, block_size)
    assert_means(means, pool, written)
    block_pages = block_size // PAGE
    assert blocks.shape == (len(LENGTHS), table.shape[1] // block_pages, HEAD_DIM)
    for row, own in enumerate(complete):
        count = len(own) // block_pages
        of_pages = means[own[: count * block_pages]].float().view(count, block_pages, HEAD_DIM)
        torch.testing.assert_close(blocks[row, :count].float(), of_pages.mean(1), rtol=2**-7, atol=1e-6)
        assert blocks[row, count:].isnan().all(), "a block that is not complete was written"


def test_both_engines_heal_alike(device: str) -> None:
    """Kernel and reference agree on page and block means but for the rounding of a sum."""
    table, lens, pages = make_table(LENGTHS, device)
    pool = make_pool(pages, device)
    means = torch.zeros(pages, HEAD_DIM, dtype=torch.bfloat16, device=device)
    update_page_means(pool, means, table, lens)
    blocks = block_means(means, table, lens, 256)
    engine = ReferenceEngine(reference_runtime(MisaConfig()), [pool])
    for row, length in enumerate(LENGTHS):
        own = table[row, : length // PAGE].long()
        engine.pages_written(0, own * PAGE + PAGE - 1)
        torch.testing.assert_close(means[own], engine.stats.means[0][own], rtol=2**-7, atol=1e-6)
        wanted = reference.block_means(engine.stats.means[0][own].unsqueeze(0), 4)[0]
        torch.testing.assert_close(blocks[row, : len(wanted)].float(), wanted, rtol=2**-6, atol=1e-6)


def test_last_page_and_slots_give_the_bits_of_the_full_pass(device: str) -> None:
    table, lens, pages = make_table(LENGTHS, device)
    pool = make_pool(pages, device)
    healed, decoded, stored = (
        torch.full((pages, HEAD_DIM), POISON, dtype=torch.bfloat16, device=device) for _ in range(3)
    )
    update_page_means(pool, healed, table, lens)
    update_last_page_means(Layers.of([pool], [decoded]), table, lens)
    last = {int(table[row, n // PAGE - 1]) for row, n in enumerate(LENGTHS) if n and n % PAGE == 0}
    assert_means(decoded, pool, last)
    assert torch.equal(decoded[sorted(last)], healed[sorted(last)])

    row = LENGTHS.index(2049)
    positions = torch.arange(100, 2049)
    slots = table[row].cpu().long()[positions // PAGE] * PAGE + positions % PAGE
    update_slots(pool, stored, torch.cat([slots, torch.tensor([-1, 0, slots[27]])]).to(device))
    finished = {int(table[row, p]) for p in range(1, 32)}
    assert_means(stored, pool, finished)
    assert torch.equal(stored[sorted(finished)], healed[sorted(finished)])


def test_one_launch_serves_every_layer_that_has_an_indexer(device: str) -> None:
    """Each layer's page gets the mean of its own bytes; a layer without pages is passed over."""
    table, lens, pages = make_table(LENGTHS, device)
    pools = [make_pool(pages, device, seed) for seed in range(3)]
    pools.insert(1, pools[0][:0])
    means = [torch.full((len(p), HEAD_DIM), POISON, dtype=torch.bfloat16, device=device) for p in pools]
    update_last_page_means(Layers.of(pools, means), table, lens)
    last = {int(table[row, n // PAGE - 1]) for row, n in enumerate(LENGTHS) if n and n % PAGE == 0}
    for pool, mean in zip(pools, means, strict=True):
        if len(pool):
            assert_means(mean, pool, last)


def test_a_decode_step_ends_with_the_means_of_all_its_layers(device: str) -> None:
    table, lens, pages = make_table(LENGTHS, device)
    pools = [make_pool(pages, device, seed) for seed in range(2)]
    runtime = Runtime(MisaConfig(), 64, 2048, 8192, device, 0, 1)
    engine = KernelEngine(runtime, pools)
    last = sorted({int(table[row, n // PAGE - 1]) for row, n in enumerate(LENGTHS) if n and n % PAGE == 0})
    engine.behind = True
    engine.end_step(table, lens)
    assert not engine.behind
    for pool, mean in zip(pools, engine.stats.means, strict=True):
        torch.testing.assert_close(mean[last].float(), naive_page_means(pool)[last], rtol=2**-7, atol=1e-6)
        others = [page for page in range(pages) if page not in last]
        assert not mean[others].any()


def test_a_page_among_many_is_read_at_its_64_bit_address(device: str) -> None:
    """The byte offset of the last page is beyond 2^31 on a GPU; on the CPU a small pool stands in."""
    pages = 2**31 // 8448 + 2 if device == "cuda" else 5
    pool = torch.zeros(pages, 8448, dtype=torch.uint8, device=device)
    pool[-1] = make_pool(1, device)[0]
    means = torch.full((pages, HEAD_DIM), POISON, dtype=torch.bfloat16, device=device)
    update_slots(pool, means, torch.tensor([pages * PAGE - 1], device=device))
    assert_means(means[-1:], pool[-1:], {0})
    assert (means[:-1] == POISON).all()


def test_empty_batches_do_nothing(device: str) -> None:
    pool = make_pool(2, device)
    means = torch.full((2, HEAD_DIM), POISON, dtype=torch.bfloat16, device=device)
    table = torch.zeros(0, 4, dtype=torch.int32, device=device)
    lens = torch.zeros(0, dtype=torch.int32, device=device)
    update_page_means(pool, means, table, lens)
    assert block_means(means, table, lens, 64).shape == (0, 4, HEAD_DIM)
    update_last_page_means(Layers.of([pool], [means]), table, lens)
    update_slots(pool, means, torch.zeros(0, dtype=torch.int64, device=device))
    assert (means == POISON).all()


def test_wrong_layouts_are_named(device: str) -> None:
    pool = make_pool(2, device)
    means = torch.empty(2, HEAD_DIM, dtype=torch.bfloat16, device=device)
    lens = torch.ones(1, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="page_table"):
        update_page_means(pool, means, torch.zeros(1, 4, dtype=torch.int64, device=device), lens)
    with pytest.raises(ValueError, match=r"index_k_pages: expected torch.uint8 of shape \(2, 8448\)"):
        update_page_means(pool[:, :100], means, torch.zeros(1, 4, dtype=torch.int32, device=device), lens)
    with pytest.raises(ValueError, match="multiple of 64, got 100"):
        block_means(means, torch.zeros(1, 4, dtype=torch.int32, device=device), lens, 100)
    with pytest.raises(ValueError, match="slots"):
        update_slots(pool, means, torch.zeros(1, dtype=torch.int32, device=device))
