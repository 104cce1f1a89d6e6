"""What the comparison of selections counts: shares by rank, windows of the newest keys, costs and the front."""

import csv
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sglang_misa import reference
from sglang_misa.bench import inputs, selection, selection_table
from sglang_misa.config import SelectionPolicy
from sglang_misa.policy_file import ModelIdentity

LENGTH, ROWS = 5000, 3


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    x = inputs.make("topics", ROWS, LENGTH, 32, device="cpu")
    positions = torch.tensor([LENGTH - 1, 4000, 3000], dtype=torch.int32)
    path = tmp_path_factory.mktemp("tensors") / "layer.safetensors"
    save_file({**vars(x), "positions": positions}, path)
    return path


@pytest.mark.parametrize(
    "policy",
    [
        SelectionPolicy(heads=8),
        SelectionPolicy(heads=7, router="peak", residual=True, block_size=64),
        SelectionPolicy(heads=4, router="signed", candidates=4096),
        SelectionPolicy(blocks=24, block_size=128),
        SelectionPolicy(sketch=2, heads=7, router="peak", residual=True, block_size=64, candidates=4096),
    ],
    ids=lambda policy: policy.name,
)
def test_a_share_is_that_of_the_references_selection(file: Path, policy: SelectionPolicy) -> None:
    layer = selection.Layer.load(file, ROWS)
    plain = policy.model_copy(update={"candidates": None})
    shares = selection.measure(layer, LENGTH, [("prefill", plain)])["prefill", policy]
    sketched = [None] * ROWS
    if policy.sketch:
        sketched = [row.keys[None] for row in layer.rows(LENGTH, layer.sketched(policy.sketch))]
    for row, keys, share in zip(layer.rows(LENGTH), sketched, shares, strict=True):
        lens = torch.tensor([[len(row.keys)]])
        scaled = row.keys[None], torch.ones(1, len(row.keys))
        tensors = row.index_q[None, None], row.head_gates[None, None], *scaled, row.means[None]
        scores = reference.policy_scores(policy, *tensors, lens, keys).flatten()
        chosen = scores.topk(selection.TOPK).indices
        assert float(share) == pytest.approx(torch.isin(row.wanted, chosen).float().mean().item(), abs=1e-6)


def test_a_row_sees_its_newest_keys_from_a_multiple_of_1024(file: Path) -> None:
    layer = selection.Layer.load(file, ROWS)
    rows = list(layer.rows(3000))
    assert [len(row.keys) for row in rows] == [LENGTH - 2048, 4001 - 1024, 3001 - 1024]
    assert [len(row.means) for row in rows] == [
        (n + 1) // 64 - s for n, s in ((LENGTH - 1, 32), (4000, 16), (3000, 16))
    ]
    assert torch.equal(rows[1].keys[-1], layer.keys[4000])
    whole = [len(row.keys) for row in layer.rows(LENGTH)]
    assert whole == [LENGTH, 4001, 3001]


def test_the_front_is_what_nothing_beats(file: Path) -> None:
    wanted = [("prefill", SelectionPolicy(heads=h, router="peak", block_size=64)) for h in (4, 8, 16)]
    rows = selection_table.table([selection.measure(selection.Layer.load(file, ROWS), LENGTH, wanted)], LENGTH, 32)
    for row in rows:
        better = [r for r in rows if r["flop"] <= row["flop"] and r["recall"] >= row["recall"] and r is not row]
        strictly = [r for r in better if (r["flop"], r["recall"]) != (row["flop"], row["recall"])]
        assert row["front"] == int(not strictly)
    assert [row["recall"] for row in rows] == sorted((row["recall"] for row in rows), reverse=True)
    direct = {row["heads"]: row for row in rows if not row["candidates"]}
    assert direct[4]["recall"] < direct[8]["recall"] < direct[16]["recall"]
    assert direct[8]["flop"] == pytest.approx(8 / 32 + 2 / 64, abs=1e-3)  # columns, and blocks of 64 in bf16


def test_every_policy_is_one_that_a_server_could_have() -> None:
    for phase, policy in selection.policies():
        candidates = 8192 if policy.sketch else None
        assert not list(policy.model_copy(update={"candidates": candidates}).problems(phase, index_heads=64, topk=2048))


def test_the_command_writes_a_table_and_a_picture(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = [p for p in selection.policies() if p[1].block_size == 64 and p[1].heads in (None, 7)]
    monkeypatch.setattr(selection, "policies", lambda: few)
    words = [str(file), "--length", "4096", "--rows", "2", "--csv", tmp_path / "t.csv", "--plot", tmp_path / "t.png"]
    assert selection.main([str(word) for word in words]) == 0
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    assert tuple(rows[0]) == selection_table.FIELDS
    assert {row["phase"] for row in rows} == {"prefill", "decode"}
    assert all(0 < float(row["recall"]) <= 1 and float(row["p10"]) <= float(row["recall"]) + 0.05 for row in rows)
    assert b"\r" not in (tmp_path / "t.csv").read_bytes()
    assert (tmp_path / "t.png").stat().st_size > 1000


X = vars(inputs.make("random", 1, 4096, 32, device="cpu")) | {"positions": torch.tensor([4095])}
BAD = {
    "expected positions of the rows, got none": {name: x for name, x in X.items() if name != "positions"},
    "each from 0 to 4095, got [4096]": X | {"positions": torch.tensor([4096])},
    "each from 0 to 4095, got [-1]": X | {"positions": torch.tensor([-1])},
    "the positions of 1 rows": X | {"positions": torch.tensor([7, 8])},
    "expected index_k in torch.float8_e4m3fn": X | {"index_k": X["index_k"].float()},
    "each from 0 to 4095, got [7.0]": X | {"positions": torch.tensor([7.0])},
    "expected k_scale in torch.float32, got torch.int64": X | {"k_scale": torch.arange(4096)},
    "expected head_gates of [rows, heads], got [32]": X | {"head_gates": X["head_gates"][0].clone()},
    "expected finite numbers in k_scale": X | {"k_scale": torch.full((4096,), torch.nan)},
    "expected finite numbers in head_gates": X | {"head_gates": torch.full((1, 32), torch.inf)},
    "got 0 and 4096": X | {"index_q": X["index_q"][:0], "head_gates": X["head_gates"][:0]},
    "got 1 and 63": X | {"index_k": X["index_k"][:63].clone(), "k_scale": X["k_scale"][:63].clone()},
}


@pytest.mark.parametrize("said", BAD)
def test_a_file_that_does_not_fit_is_refused(said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(BAD[said], tmp_path / "x.safetensors")
    with pytest.raises(SystemExit, match="2"):
        selection.main([str(tmp_path / "x.safetensors"), "--length", "4096"])
    assert said in capsys.readouterr().err


def of_a_small_model(path: Path, positions: list[int], keys: int = 764, layer: int = 0, **changes: object) -> Path:
    """A dump of a model that selects 256 of a prompt's tokens."""
    sizes = {"architecture": "A", "layers": 2, "index_heads": 32, "index_topk": 256, "config_sha256": "0" * 64}
    identity = ModelIdentity(**sizes | changes)
    x = vars(inputs.make("topics", len(positions), keys, 32, device="cpu")) | {"positions": torch.tensor(positions)}
    save_file(x, path, {"model": identity.model_dump_json(), "layer": str(layer)})
    return path


@pytest.mark.parametrize("length", [2048, 2100, 3000])
def test_a_length_that_leaves_nothing_to_select_is_refused(
    file: Path, length: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):  # of 3000 the row at 3000 sees 1977
        selection.main([str(file), "--length", str(length)])
    assert f"--length: expected all keys of {file} or 3072, as windows" in capsys.readouterr().err


def test_a_row_of_a_short_prompt_sees_more_than_is_selected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right = of_a_small_model(tmp_path / "right", [256, 763])
    for words, said in (
        ((right, "--length", 700), "got 700, which leaves a row 0 to select 256 of"),
        (
            (of_a_small_model(tmp_path / "early", [255, 763]),),
            "see more than the 256 keys to select, got one at position",
        ),
    ):
        with pytest.raises(SystemExit, match="2"):
            selection.main([*map(str, words)])
        assert said in capsys.readouterr().err


def test_a_length_is_what_a_file_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [("prefill", SelectionPolicy(heads=8)), ("decode", SelectionPolicy(blocks=4, block_size=64))]
    monkeypatch.setattr(selection, "policies", lambda: few)
    files = [of_a_small_model(tmp_path / "short", [300, 763]), of_a_small_model(tmp_path / "long", [1000, 1399], 1400)]
    out = tmp_path / "t.csv"
    assert selection.main([*map(str, files), "--csv", str(out)]) == 0
    assert {row["length"] for row in csv.DictReader(out.open())} == {"1400"}
    assert selection.main([*map(str, files), "--length", "1400", "1300"]) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        selection.main([*map(str, files), "--length", "1300", "1401"])
    assert "--length: expected at most 1400, the longest file's keys, got 1401; lower it" in capsys.readouterr().err
    monkeypatch.setattr(selection, "LENGTH", 1350)
    assert selection.judged(files, 2, []) == [1350]
    assert selection.judged(files, 2, [9999], bound=True) == [1400]


def test_a_picture_that_cannot_be_drawn_is_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        selection.main([str(file), "--plot", str(tmp_path / "t.txt")])


def test_files_of_two_models_are_refused(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "policies", list)
    other = vars(inputs.make("random", 1, 4096, 64, device="cpu")) | {"positions": torch.tensor([4095])}
    save_file(other, tmp_path / "x.safetensors")
    with pytest.raises(SystemExit, match="2"):
        selection.main([str(file), str(tmp_path / "x.safetensors"), "--length", "4096"])
    assert "expected 32 index heads, got 64; name one model's files" in capsys.readouterr().err
    ours = of_a_small_model(tmp_path / "ours", [300, 763])
    for said, other in (
        ("256 keys to select, got 128", of_a_small_model(tmp_path / "narrow", [300, 763], index_topk=128)),
        ("expected each file once", tmp_path / "ours"),
        ("000 as config_sha256, got 111", of_a_small_model(tmp_path / "other", [300, 763], config_sha256="1" * 64)),
    ):
        with pytest.raises(SystemExit, match="2"):
            selection.main([str(ours), str(other)])
        assert said in capsys.readouterr().err


def test_the_worst_layer_is_a_layer_not_a_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two layers and two prompts the worst layer keeps 0.5; one prompt of it keeps 0.25."""
    policy, out = ("prefill", SelectionPolicy(heads=8)), tmp_path / "t.csv"
    kept = {"00": 0.9, "10": 0.7, "01": 0.25, "11": 0.75}
    files = [of_a_small_model(tmp_path / name, [300, 763], layer=int(name[1])) for name in kept]
    monkeypatch.setattr(selection, "policies", lambda: [policy])
    monkeypatch.setattr(selection, "measure", lambda layer, *_: {policy: torch.tensor([kept[layer.path.name]])})
    assert selection.main([*map(str, files), "--csv", str(out)]) == 0
    (row,) = csv.DictReader(out.open())
    assert (row["recall"], row["worst_layer"]) == ("0.65", "0.5")


def test_blocks_have_no_candidates_to_score_again(file: Path) -> None:
    wanted = [("decode", SelectionPolicy(blocks=64, block_size=64)), ("prefill", SelectionPolicy(heads=8))]
    found = selection.measure(selection.Layer.load(file, 1), LENGTH, wanted)
    assert [policy.candidates for phase, policy in found if phase == "decode"] == [None]
    assert [policy.candidates for phase, policy in found if phase == "prefill"] == [None, 3072, 4096, 8192, 16384]


def test_equal_scores_are_no_merit() -> None:
    keys = torch.zeros(8, 128)
    keys[:, 0] = torch.arange(8)
    row = selection.Row(torch.eye(1, 128), torch.ones(1), keys, keys[:0], topk=4)
    assert row.wanted.sort().values.tolist() == [4, 5, 6, 7]
    level = torch.tensor([2.0, 0, 0, 0, 0, 0, 1, 0])
    assert row.kept(torch.zeros(8), (4, 6, 8, 9)) == pytest.approx([0.5, 0.75, 1, 1])
    assert row.kept(level, (1, 2, 4)) == pytest.approx([0, 1 / 4, (1 + 3 * 2 / 6) / 4])
    pruned = torch.tensor([1.0, 2, -torch.inf, -torch.inf, -torch.inf, -torch.inf, 3, torch.inf])
    assert row.kept(pruned, (1, 2, 6)) == pytest.approx([1 / 4, 2 / 4, 2 / 4])
