"""What the kernel bench counts and what it measures: all of it that needs no GPU."""

import pytest
import torch

from sglang_misa.bench import kernels
from sglang_misa.bench.work import CHIPS, Work, count
from sglang_misa.config import PRESETS, SelectionPolicy

LENS = torch.tensor([1000, 3000], dtype=torch.int32)  # 3 + 11 blocks of 256, 7 + 23 of 128, 15 + 46 pages
HISA = SelectionPolicy(blocks=4, block_size=128)  # keeps 512 tokens of each


@pytest.mark.parametrize(
    ("policy", "fp8", "bf16"),
    [
        (SelectionPolicy(), 4000 * 64 * 256, 0),
        (SelectionPolicy(heads=8), 4000 * 8 * 256, 14 * 64 * 256),
        (SelectionPolicy(heads=8, candidates=2000), (4000 * 8 + 3000 * 64) * 256, 14 * 64 * 256),
        (HISA, 1024 * 64 * 256, 30 * 64 * 256),
        (HISA.model_copy(update={"heads": 8}), 1024 * 8 * 256, 30 * 64 * 256),
    ],
)
def test_prefill_is_counted_in_flop(policy: SelectionPolicy, fp8: int, bf16: int) -> None:
    assert count(policy, "prefill", 64, LENS) == Work(fp8=fp8, bf16=bf16)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (SelectionPolicy(), 4000 * 132),
        (HISA, 1024 * 132 + 61 * 256),
        (SelectionPolicy(heads=8), 4000 * 132 + 61 * 256),
    ],
)
def test_decode_is_counted_in_bytes(policy: SelectionPolicy, expected: int) -> None:
    assert count(policy, "decode", 64, LENS) == count(policy, "decode", 32, LENS) == Work(bytes=expected)


def test_at_the_floor_the_rates_are_the_chips() -> None:
    h100 = CHIPS["NVIDIA H100 80GB HBM3"]
    scored, read = Work(fp8=3e9), Work(bytes=7e6)
    assert scored.tflops(scored.floor_us(h100)) == pytest.approx(1979)
    assert read.gb_s(read.floor_us(h100)) == pytest.approx(3350)
    both = Work(fp8=1979e6, bf16=989e6)  # a µs of each
    assert (both.floor_us(h100), both.tflops(2.0)) == (pytest.approx(2), pytest.approx(1484))


def test_every_method_of_a_phase_is_measured_once() -> None:
    prefill, decode = (kernels.arguments([phase]).methods for phase in ("prefill", "decode"))
    assert [m.name for m in prefill] == ["misa", "misa-hier", "hisa", "plain"]
    assert [m.name for m in decode] == ["hisa"]
    plain = kernels.arguments(["prefill", "--policies", "plain"]).methods
    assert plain == prefill[3:]
    assert plain[0].policy == prefill[0].policy == PRESETS["misa"].prefill.model_copy(update={"min_len": 0})


def test_sizes_go_to_the_methods_that_have_them() -> None:
    words = ["prefill", "--policies", "misa", "misa-hier", "hisa", "--heads", "4", "16", "--candidates", "4096"]
    found = [(m.name, m.policy.heads, m.policy.candidates, m.policy.blocks) for m in kernels.arguments(words).methods]
    assert found == [
        ("misa", 4, None, None),
        ("misa", 16, None, None),
        ("misa-hier", 4, 4096, None),
        ("misa-hier", 16, 4096, None),
        ("hisa", None, None, 64),
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--heads", "5"], "--heads: invalid choice: 5"),
        (["--heads", "64"], "expected at most the model's 32 index heads, got 64"),
        (["--candidates", "1024"], "expected at least the model's index_topk = 2048, got 1024"),
        (["--blocks", "8"], "got 8 × 128 = 1024"),
    ],
)
def test_impossible_sizes_are_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kernels.arguments(["prefill", *words])
    assert said in capsys.readouterr().err


def test_nothing_to_measure_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kernels.arguments(["decode", "--policies", "plain", "misa"])
    assert "expected one of hisa, misa-hisa in decode, got plain misa" in capsys.readouterr().err
