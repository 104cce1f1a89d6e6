"""What the kernel bench counts and what it measures: all of it that needs no GPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sglang_misa.bench import inputs, kernels, watching
from sglang_misa.bench.commit import commit
from sglang_misa.bench.table import append
from sglang_misa.bench.work import CHIPS, Work, work_of
from sglang_misa.config import PHASES, PRESETS, SelectionPolicy

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
        (SelectionPolicy(heads=7, residual=True), 4000 * 8 * 256, 14 * 64 * 256),
        (SelectionPolicy(exact=True), 4000 * 64 * 256, 0),
    ],
)
def test_prefill_is_counted_in_flop(policy: SelectionPolicy, fp8: int, bf16: int) -> None:
    assert work_of(policy, "prefill", 64, LENS) == Work(fp8=fp8, bf16=bf16)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (SelectionPolicy(), 4000 * 132),
        (HISA, 1024 * 132 + 61 * 256),
        (SelectionPolicy(heads=8), 4000 * 132 + 61 * 256),
        (SelectionPolicy(sketch=1, candidates=512), 4000 * 18 + 1024 * 132 + 61 * 256),
    ],
)
def test_decode_is_counted_in_bytes(policy: SelectionPolicy, expected: int) -> None:
    assert work_of(policy, "decode", 64, LENS) == work_of(policy, "decode", 32, LENS) == Work(bytes=expected)


def test_at_the_floor_the_rates_are_the_chips() -> None:
    h100 = CHIPS["NVIDIA H100 80GB HBM3"]
    scored, read = Work(fp8=3e9), Work(bytes=7e6)
    assert scored.tflops(scored.floor_us(h100)) == pytest.approx(1979)
    assert read.gb_s(read.floor_us(h100)) == pytest.approx(3350)
    both = Work(fp8=1979e6, bf16=989e6)  # a µs of each
    assert (both.floor_us(h100), both.tflops(2.0)) == (pytest.approx(2), pytest.approx(1484))


def test_every_policy_of_a_phase_is_measured_once() -> None:
    prefill, decode = (
        [c.preset for c in kernels.cases([phase, "--rows", "1", "--length", "64"])[0]] for phase in PHASES
    )
    assert prefill == ["misa", "misa-hier", "hisa", "fast", "faithful", "exact"]  # misa-hisa prefills as misa does
    assert decode == ["hisa", "fast", "faithful"]
    (case,), _ = kernels.cases(["prefill", "--preset", "misa", "--length", "65536"])
    assert case.policy == PRESETS["misa"].prefill.model_copy(update={"min_len": 0})
    assert (case.rows, case.inputs) == (8192, "random")


def test_sizes_go_to_the_policies_that_have_them() -> None:
    words = ["prefill", "--preset", "misa", "misa-hier", "hisa", "--heads", "4", "16", "--candidates", "4096"]
    found, _ = kernels.cases([*words, "--length", "65536"])
    assert [(c.preset, c.policy.heads, c.policy.candidates, c.policy.blocks) for c in found] == [
        ("misa", 4, None, None),
        ("misa", 16, None, None),
        ("misa-hier", 4, 4096, None),
        ("misa-hier", 16, 4096, None),
        ("hisa", None, None, 64),
    ]


def test_cached_prefixes_hostile_inputs_and_shared_calls_are_cases() -> None:
    found, _ = kernels.cases(["prefill", "--preset", "fast", "--cached"])
    assert {(c.rows, c.length) for c in found} == {(r, k << 10) for r in (1024, 2048, 4096) for k in (128, 256, 512)}
    found, _ = kernels.cases(["prefill", "--preset", "fast", "--length", "8192", "--inputs", "hostile", "random"])
    assert len(found) == len(inputs.names()) + 1
    found, _ = kernels.cases(
        ["prefill", "--preset", "misa", "--rows", "64", "--length", "8192", "--requests", "1", "64"]
    )
    assert [c.source for c in found] == ["random", "random x64"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(("program", "words"), [(kernels.main, ["decode"]), (watching.main, [])])
def test_a_machine_without_a_gpu_is_told_so(
    program: Callable[[list[str]], int], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert program(words) == 2
    assert "expected a GPU, got none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prefill", "--heads", "33", "--index-heads", "32"], "expected at most the model's 32 index heads, got 33"),
        (["prefill", "--candidates", "1024"], "expected at least the model's index_topk = 2048, got 1024"),
        (["prefill", "--blocks", "8"], "got 8 × 128 = 1024"),
        (
            ["decode", "--preset", "misa"],
            "expected one of hisa, misa-hisa, fast, faithful in decode, got misa",
        ),
        (["decode", "--cached"], "expected prefill"),
        (["prefill", "--rows", "9000", "--length", "8192"], "expected at most as many as keys"),
    ],
)
def test_impossible_cases_are_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kernels.cases(words)
    assert said in capsys.readouterr().err


def test_the_commit_is_that_of_the_checkout_or_none() -> None:
    assert commit() == "" or commit().removesuffix("-dirty").isalnum()


def test_a_new_file_starts_with_the_columns(tmp_path: Path) -> None:
    path = tmp_path / "out" / "kernels.csv"
    for _ in range(2):
        append(path, ["policy", "rows"], [{"rows": 8, "policy": "misa"}])
    assert path.read_bytes() == b"policy,rows\nmisa,8\nmisa,8\n"
