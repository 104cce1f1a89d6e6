"""What calibrate chooses: by which rows, how surely, and held out from what."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from dumped_files import IDENTITY, dumped

from sglang_misa.bench import inputs, selection
from sglang_misa.calibrate import __main__ as calibrate
from sglang_misa.calibrate import choice
from sglang_misa.calibrate.costs import SHIPPED, Measured, Modelled
from sglang_misa.config import MisaConfig, SelectionPolicy

LENGTH = 8192
UNGATED = dict.fromkeys(("prefill", "decode"), SelectionPolicy(min_len=0))
FEW = [("prefill", SelectionPolicy(heads=8, router="peak")), ("decode", SelectionPolicy(blocks=24, block_size=128))]


def point(cost: float, *recalls: float, **policy: Any) -> choice.Point:
    return choice.Point(SelectionPolicy(**policy), cost, [torch.tensor(recalls)], [torch.tensor(recalls)])


def test_the_cheapest_that_surely_keeps_it_is_chosen() -> None:
    sure, better = point(0.2, 0.95, 0.95, 0.95), point(0.2, 0.96, 0.96, 0.96)
    lucky = point(0.1, 0.82, 1.0, 1.0)  # 0.94 in the mean, and 0.06 of error
    assert choice.choose([point(1.0, 1.0, 1.0), sure, better, lucky], 0.93) is better
    assert choice.choose([point(1.0, 1.0, 1.0), sure, better, lucky], 0.97).cost == 1.0


def test_decode_is_measured_where_a_row_sees_nearly_the_whole_prompt(tmp_path: Path, monkeypatch) -> None:
    few = [(phase, policy) for phase, policy in selection.policies() if policy.heads == 7 and policy.block_size == 64]
    monkeypatch.setattr(selection, "policies", lambda: few)
    positions = torch.tensor([2100, 2500, 3000, 3071, 3072, 4095]).int()
    x = vars(inputs.make("topics", len(positions), 4096, 64, device="cpu")) | {"positions": positions}
    path = dumped(tmp_path / "a.safetensors", x, 0)
    settings = {"length": 4096, "rows": len(positions), "device": "cpu", "gates": UNGATED}
    found = choice.points([choice.Dumped(path)], IDENTITY, Modelled(64, 4096), **settings)
    rows = {phase: sum(map(len, (*points[0].calibrated, *points[0].held_out))) for phase, points in found.items()}
    assert rows == {"prefill": 6, "decode": 3}

    dumps = [choice.Dumped(path), choice.Dumped(path, answer=3000)]
    found = choice.points(dumps, IDENTITY, Modelled(64, 4096), **settings)
    rows = {phase: sum(map(len, (*points[0].calibrated, *points[0].held_out))) for phase, points in found.items()}
    assert rows == {"prefill": 6, "decode": 4}, "the rows of answers alone"


def test_all_layers_sketch_alike() -> None:
    one, two = point(0.1, 0.96, 0.96, sketch=1, candidates=8192), point(0.2, 0.99, 0.99, sketch=2, candidates=8192)
    weak = point(0.1, 0.9, 0.9, sketch=1, candidates=8192)
    dsa = point(1.0, 1.0, 1.0)
    found = {0: {"prefill": [dsa], "decode": [one, two, dsa]}, 1: {"prefill": [dsa], "decode": [weak, two, dsa]}}
    chosen = calibrate._chosen(found, 0.95)
    assert [each["decode"] for each in chosen.values()] == [two, two]


def test_every_candidate_can_be_served() -> None:
    for costs in (Modelled(64, LENGTH), Measured.read(SHIPPED, 64, LENGTH, 64)):
        for phase, policy in choice.policies(costs, IDENTITY):
            candidates = 8192 if policy.sketch else None
            MisaConfig.from_mapping({phase: policy.model_copy(update={"candidates": candidates}).model_dump()}, "here")


def tensors(positions: Sequence[int], keys: int = 4096, seed: int = 0) -> dict[str, torch.Tensor]:
    x = vars(inputs.make("topics", len(positions), keys, 64, device="cpu", seed=seed))
    return x | {"positions": torch.tensor(positions).int()}


def measured(files: Sequence[Path], **gates: SelectionPolicy) -> dict[str, list[choice.Point]]:
    """The points of the policies in FEW, by phase, without DSA."""
    settings = {"length": 4096, "rows": 64, "device": "cpu", "gates": UNGATED | gates}
    found = choice.points([choice.Dumped(file) for file in files], IDENTITY, Modelled(64, 4096), **settings)
    return {phase: [point for point in each if point.policy not in choice.DSA] for phase, each in found.items()}


def test_the_error_of_a_recall_is_of_prompts_where_these_differ() -> None:
    """Rows of one prompt are alike: by rows alone a policy under the target was chosen in half of all trials."""
    one = choice.Point(SelectionPolicy(), 0.1, [torch.tensor([0.9, 1.0, 0.9, 1.0])], [])
    assert one.error == pytest.approx(torch.tensor([0.9, 1.0, 0.9, 1.0]).std().item() / 2)
    alike = choice.Point(SelectionPolicy(), 0.1, [torch.tensor([0.9, 1.0]), torch.tensor([0.9, 1.0])], [])
    assert alike.error == pytest.approx(one.error), "no less than of rows"
    apart = choice.Point(SelectionPolicy(), 0.1, [torch.full((50,), 0.9), torch.full((50,), 1.0)], [])
    assert apart.error == pytest.approx(torch.tensor([0.9, 1.0]).std().item() / 2**0.5)


def test_a_target_is_kept_as_often_as_one_standard_error_says() -> None:
    """Of policies with a known recall on prompts that differ, one under the target is seldom chosen."""
    g = torch.Generator().manual_seed(0)
    recalls, prompts, trials, missed = torch.linspace(0.91, 0.99, 30), 16, 200, 0
    for _ in range(trials):
        rows = recalls[:, None, None] + 0.02 * torch.randn(1, prompts, 1, generator=g)
        rows = rows + 0.02 * torch.randn(30, prompts, 32, generator=g)
        found = [choice.Point(SelectionPolicy(heads=i + 1), i / 30, [*each], []) for i, each in enumerate(rows)]
        dsa = choice.Point(SelectionPolicy(), 1.0, [torch.ones(2)], [torch.ones(1)])
        missed += recalls[(choice.choose([*found, dsa], 0.95).policy.heads or 30) - 1].item() < 0.95
    assert missed / trials < 0.25


def test_halves_hold_whole_groups_and_as_many_rows_as_can_be() -> None:
    def lengths(*prompts: tuple[int, int]) -> list[list[int]]:
        return [[*map(len, half)] for half in choice.halves([(group, torch.ones(rows)) for group, rows in prompts])]

    assert lengths((0, 64), (1, 64), (2, 64), (3, 64)) == [[64, 64], [64, 64]]
    assert lengths((0, 1), (1, 64)) == [[64], [1]], "one row would choose without an error"
    assert lengths((0, 64), (0, 60), (2, 64), (3, 64)) == [[124], [64, 64]]
    assert lengths((0, 64), (0, 60)) == [[64], [60]], "of one group alone"
    assert lengths((0, 5)) == [[3], [2]]
    by_turns = choice.halves([(0, torch.arange(4))])
    assert [half[0].tolist() for half in by_turns] == [[0, 2], [1, 3]]


def test_a_prompt_and_its_continuation_are_in_one_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that `calibrate --server` filled has each prompt, and the prompt again with its answer behind it."""
    monkeypatch.setattr(selection, "policies", lambda: FEW[:1])
    files = []
    for seed in range(2):
        longer = tensors([2500, 4095], seed=seed)
        shorter = longer | {name: longer[name][:3000].clone() for name in ("index_k", "k_scale")}
        shorter["positions"] = torch.tensor([2500, 2999]).int()
        files += [dumped(tmp_path / f"{seed}{name}", x, 0) for name, x in (("a", shorter), ("b", longer))]
    point = measured(files)["prefill"][0]
    assert [len(rows) for rows in (*point.calibrated, *point.held_out)] == [4, 4]
    alone = [measured([*files[start : start + 2]])["prefill"][0] for start in (0, 2)]
    for half, pair in zip((point.calibrated, point.held_out), alone, strict=True):
        assert half[0].tolist() == torch.cat([*pair.calibrated, *pair.held_out]).tolist()


def test_rows_that_stock_dsa_selects_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "policies", lambda: FEW)
    positions = [2999, 3000, 3071, 3500, 3900, 4063, 4064, 4095]
    file = dumped(tmp_path / "a", tensors(positions), 0)
    gate = SelectionPolicy(min_len=3000)
    rows = {phase: points[0].rows for phase, points in measured([file], prefill=gate, decode=gate).items()}
    assert rows == {"prefill": "4+3", "decode": "3+3"}, "and decode sees nearly all"
    tail = gate.model_copy(update={"tail": 32})
    assert {phase: points[0].rows for phase, points in measured([file], prefill=tail).items()}["prefill"] == "3+2"
    assert measured([file], decode=SelectionPolicy(min_len=4062))["decode"][0].rows == "2+1"
    assert measured([file], decode=SelectionPolicy(min_len=4063))["decode"][0].rows == "2+1"
    assert measured([file], decode=SelectionPolicy(min_len=4064))["decode"] == [], "two rows are too few"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--min-len", 4000, "--costs", "model"), None),
        (("--costs", "model"), "expected 3 rows or more of prefill that see more than --min-len 8192 keys, got fewer"),
    ],
    ids=["both", "gated"],
)
def test_a_phase_that_is_left_to_dsa_for_lack_of_anything_else_is_told(
    words: tuple[object, ...], said: str | None, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "policies", lambda: FEW)
    file, out = dumped(tmp_path / "a", tensors(range(4010, 4096, 10)), 0), tmp_path / "out.json"
    status = calibrate.main([str(word) for word in (file, "--target", 0.5, "--out", out, *words)])
    told = capsys.readouterr()
    assert ("DSA in" in told.out) == (said is not None and status == 0)
    assert said is None or said in told.out + told.err
    assert (status, out.exists()) == ((calibrate.REFUSED, False) if words[0] == "--costs" else (0, True))


def test_a_table_of_costs_without_a_phase_leaves_it_to_dsa_and_says_so(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    priced = SelectionPolicy(heads=3, router="error", residual=True, block_size=512)
    monkeypatch.setattr(selection, "policies", lambda: [("prefill", priced), FEW[1]])
    costs, out = tmp_path / "costs.csv", tmp_path / "out.json"
    lines = SHIPPED.read_text().splitlines(keepends=True)
    costs.write_text("".join(line for line in lines if ",decode," not in line))
    file = dumped(tmp_path / "a", tensors(range(4010, 4096, 10)), 0)
    words = (file, "--target", 0.5, "--min-len", 2048, "--costs", costs, "--out", out)
    assert calibrate.main([str(word) for word in words]) == 0
    assert "DSA in decode of layers 0: expected a policy of decode that the model can have" in capsys.readouterr().out


def test_the_report_tells_how_many_rows_and_what_was_under_the_target(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "policies", lambda: FEW)
    few = {"prefill": point(0.5, 0.96, 0.96, heads=8), "decode": point(1.0, 1.0, 1.0)}
    few["prefill"] = choice.Point(few["prefill"].policy, 0.5, few["prefill"].calibrated, [torch.tensor([0.9])])
    monkeypatch.setattr(choice, "points", lambda *_, **__: {phase: [each] for phase, each in few.items()})
    file, out = dumped(tmp_path / "a", tensors([4000, 4095]), 2), tmp_path / "out.json"
    assert calibrate.main(list(map(str, (file, "--target", 0.95, "--costs", "model", "--out", out)))) == 0
    told = capsys.readouterr().out
    assert "0.9600  0.9000    2+1" in told
    assert "Under the target on the rows that were held out: prefill of layer 2\n" in told
    assert [*json.loads(out.read_text())["layers"]["2"]["recall"]] == ["prefill"], "nothing was measured of stock DSA"


def test_layers_sketch_alike_by_what_costs_least_in_all() -> None:
    """One layer that needs two bits may be left to DSA, where all others do with one."""
    one, two = point(0.3, 0.96, 0.96, sketch=1, candidates=8192), point(0.4, 0.99, 0.99, sketch=2, candidates=8192)
    weak, dsa = point(0.3, 0.9, 0.9, sketch=1, candidates=8192), point(1.0, 1.0, 1.0)
    found = {layer: {"prefill": [dsa], "decode": [one, two, dsa]} for layer in range(10)}
    found[10] = {"prefill": [dsa], "decode": [weak, two, dsa]}
    assert [each["decode"] for each in calibrate._chosen(found, 0.95).values()] == [one] * 10 + [dsa]
    del found[1], found[2], found[3], found[4], found[5]
    assert [each["decode"] for each in calibrate._chosen(found, 0.95).values()] == [two] * 6
