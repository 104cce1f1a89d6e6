"""The canary finds statistics that are not their page's, names them, and looks at nothing that may hold anything."""

from collections import Counter

import pytest
import torch
from pools import reference_engine, reference_runtime
from recorders import fresh_recorder

from sglang_misa import canary as canary_module
from sglang_misa.bench.host_cache import make_pool
from sglang_misa.canary import Canary, StaleStatistics
from sglang_misa.config import PRESETS, ConfigError, MisaConfig
from sglang_misa.kernels.layout import PAGE, PAGE_BYTES
from sglang_misa.metrics import Recorder

LAYERS, PAGES = 2, 12
LENS = torch.tensor([5 * PAGE + 7, 40, 3 * PAGE])  # the second request has no complete page
NAMES = ["long", "short", "exact"]


class Step:
    """Three requests on shuffled pages of a pool whose other bytes are garbage, statistics up to date."""

    def __init__(self) -> None:
        self.pool, _ = make_pool(PAGES, LAYERS)
        for buffer in self.pool.index_k_with_scale_buffer:
            buffer.random_(0, 256)
        self.engine = reference_engine(self.pool.index_k_with_scale_buffer)
        pages = torch.randperm(PAGES, generator=torch.Generator().manual_seed(0)) + 1
        slots = (pages[:, None] * PAGE + torch.arange(PAGE)).flatten()
        self.req_to_token = torch.zeros(8, PAGES * PAGE, dtype=torch.int32)
        self.req_ids = torch.tensor([6, 1, 3])
        first = 0
        for row, length in zip(self.req_ids.tolist(), LENS.tolist(), strict=True):
            last = first + -(-length // PAGE) * PAGE
            self.req_to_token[row, : last - first] = slots[first:last]
            for layer in range(LAYERS):
                self.engine.pages_written(layer, slots[first : first + length])
            first = last

    def look(self, canary: Canary, steps: int) -> None:
        for _ in range(steps):
            canary.step(self.req_to_token, self.req_ids, LENS, NAMES)

    def page(self, row: int, logical: int) -> int:
        return int(self.req_to_token[self.req_ids[row], logical * PAGE]) // PAGE


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return fresh_recorder(monkeypatch, canary_module)


def test_statistics_of_their_pages_pass(recorder: Recorder) -> None:
    step = Step()
    step.look(Canary(step.engine, range(LAYERS), "raise"), 50)
    seen = recorder.status()["page_stats_verified"]
    assert seen["mismatches"] == 0
    assert seen["pages"] == 50 * int((LENS // PAGE).sum()), "fewer than a sample, so each is looked at once a step"


@pytest.mark.parametrize(("row", "logical"), [(0, 0), (0, 4), (2, 2)])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_one_wrong_bit_is_found_and_named(recorder: Recorder, row: int, logical: int, layer: int) -> None:
    step = Step()
    page = step.page(row, logical)
    means = step.engine.stats.means[layer][page].view(torch.uint8)
    means[9] ^= 1
    with pytest.raises(StaleStatistics) as told:
        step.look(Canary(step.engine, range(LAYERS), "raise"), 60)
    right = int(means[9]) ^ 1
    assert f"page {page} of layer {layer}, request {NAMES[row]}" in str(told.value)
    assert f"byte 9 of its statistics to be {right} as computed from the pool, got {int(means[9])}" in str(told.value)
    assert recorder.status()["page_stats_verified"]["mismatches"] > 0


def test_every_page_of_every_layer_is_looked_at(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more pages than a sample has. Layers and places drawn by generators of one seed went together."""
    layers, pages, looks = 4, 78, 400
    pool, _ = make_pool(pages, layers)
    engine = reference_engine(pool.index_k_with_scale_buffer)
    compared, seen = engine.compared, Counter[tuple[int, int]]()

    def watched(layer: int, drawn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.update((layer, page) for page in drawn.tolist())
        return compared(layer, drawn)

    monkeypatch.setattr(engine, "compared", watched)
    canary = Canary(engine, range(layers), "log")
    slots = torch.arange(PAGE, (pages + 1) * PAGE).unsqueeze(0)
    for _ in range(looks):
        canary.step(slots, torch.tensor([0]), torch.tensor([pages * PAGE]), ["a request"])
    expected = looks * canary_module.SAMPLE / (layers * pages)
    assert len(seen) == layers * pages
    assert all(abs(count - expected) < 6 * expected**0.5 for count in seen.values())


def test_log_counts_and_goes_on(recorder: Recorder, caplog: pytest.LogCaptureFixture) -> None:
    step = Step()
    step.engine.stats.means[1][step.page(0, 1)] = 7.0
    step.look(Canary(step.engine, range(LAYERS), "log"), 60)
    assert recorder.status()["page_stats_verified"]["mismatches"] == len(caplog.records) > 1


def test_incomplete_and_free_pages_may_hold_anything(recorder: Recorder) -> None:
    step = Step()
    used = {step.page(0, i) for i in range(5)} | {step.page(2, i) for i in range(3)}
    for layer in range(LAYERS):
        for page in set(range(PAGES + 1)) - used:
            step.engine.stats.means[layer][page].fill_(float("nan"))
            step.pool.index_k_with_scale_buffer[layer][page].random_(0, 256)
    step.look(Canary(step.engine, range(LAYERS), "raise"), 60)
    assert recorder.status()["page_stats_verified"]["mismatches"] == 0


def test_layers_whose_indexer_never_runs_are_left_alone(recorder: Recorder) -> None:
    step = Step()
    step.engine.stats.means[0].fill_(float("nan"))
    step.look(Canary(step.engine, [1], "raise"), 60)
    assert recorder.status()["page_stats_verified"]["pages"] > 0


@pytest.mark.parametrize("preset", ["misa-hisa", "fast", "faithful"])
def test_kernels_compute_the_same_bits_wherever_a_page_lies(preset: str) -> None:
    """By the extend path, by the decode path and anew for the canary: one program, whatever the launch."""
    from sglang_misa.engines.kernels import KernelEngine

    pages = torch.zeros(6, PAGE_BYTES, dtype=torch.uint8)
    pages[:, : PAGE * 128] = torch.randn(6, PAGE * 128).to(torch.float8_e4m3fn).view(torch.uint8)
    pages[:, PAGE * 128 :] = torch.rand(6, PAGE).view(torch.uint8)
    engine = KernelEngine(reference_runtime(PRESETS[preset]), [pages])
    engine.pages_written(0, torch.tensor([1, 3]) * PAGE + PAGE - 1)
    engine.end_step(torch.tensor([[4, 5]], dtype=torch.int32), torch.tensor([2 * PAGE], dtype=torch.int32))
    some = torch.tensor([5, -1, 1, 3], dtype=torch.int32)
    seen, wrong = engine.compared(0, some)
    assert wrong.tolist() == [0, -1, 0, 0]
    bits = torch.cat([kind.view(torch.uint8) for kind in engine.stats.of(0, some[[0, 2, 3]].long())], 1)
    for side in seen.view(torch.uint8)[:, [0, 2, 3]]:
        assert torch.equal(side, bits)
    for kind in engine.stats.kinds(0):  # the last bit of each kind of statistic counts
        kind.view(torch.uint8)[3, -1] ^= 0x80
        seen, wrong = engine.compared(0, some)
        assert wrong.tolist() == [0, -1, 0, 1]
        assert (seen[0, 3] != seen[1, 3]).sum() == 1
        kind.view(torch.uint8)[3, -1] ^= 0x80


def test_the_flag_asks_for_a_decode_policy() -> None:
    with pytest.raises(ConfigError, match="only decode keeps statistics"):
        MisaConfig.from_mapping({**PRESETS["misa"].model_dump(), "verify_stats": "log"}, "test")
    kept = MisaConfig.from_mapping({**PRESETS["misa-hisa"].model_dump(), "verify_stats": "raise"}, "test")
    assert kept.verify_stats == "raise"
