"""A served model whose router breaks: its layers leave their policy and come back once it is repaired. And its dumps.

The tiny model has 64 tokens as its top-k, so that 300 are a long prompt.
"""

import json
import os
import random
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sglang_misa import random_model
from sglang_misa.bench import selection
from sglang_misa.ladder import CALM, WINDOW

pytestmark = pytest.mark.serving

ROWS, DUMPED, LIMIT = 16, 8, 2 << 20  # audited rows a call, dumped rows a prompt, bytes of all dumps
FLOOR = 0.6  # the router keeps about 0.75 here, and a broken one 0.2 to 0.5
LONG = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("floor")


@pytest.fixture(scope="module")
def guarded(start, model: Path, folder: Path) -> Iterator[Any]:
    (folder / "pool").mkdir()
    words = (
        f"--misa-decode-blocks all --misa-decode-heads 8 --misa-audit-rows {ROWS} --misa-recall-floor {FLOOR} "
        f"--misa-dump {folder}/dump --misa-dump-rows {DUMPED} --misa-dump-gib {LIMIT / 2**30}"
    )
    environ = {
        "WATCH_POOL": str(folder / "pool"),
        "SABOTAGE": str(folder / "broken"),
    }
    with start(words, model, folder / "log", **environ) as server:
        yield server


def prompt(seed: int, length: int) -> list[int]:
    numbers = random.Random(seed)
    return [numbers.randrange(2, 250) for _ in range(length)]


def read(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Metadata and bytes of each tensor, by the format's own description: a length, a JSON header, the bytes."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    facts = header.pop("__metadata__")
    start = 8 + size
    return facts, {
        name: np.frombuffer(raw[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]], np.uint8)
        for name, entry in header.items()
    }


def test_a_dump_holds_what_the_pool_holds(guarded, folder: Path) -> None:
    guarded.flush()
    length, layers = 700, random_model.CPU.layers
    before = len(list((folder / "dump").glob("*.safetensors")))
    guarded.generate(prompt(1, length), new=2)
    files = sorted((folder / "dump").glob("*.safetensors"))[before:]
    assert [file.name.split("-")[3] for file in files] == [f"{layer:03}" for layer in range(layers)]
    assert stat.S_IMODE((folder / "dump").stat().st_mode) == 0o700
    for layer, file in enumerate(files):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        facts, tensors = read(file)
        assert facts["layer"] == str(layer)
        assert json.loads(facts["model"])["index_topk"] == random_model.CPU.index_topk
        seen = torch.load(folder / "pool" / f"{layer}-{length}.pt")
        pages = seen["pages"].numpy()
        keys, scales = pages[:, : 64 * 128].reshape(-1, 128), pages[:, 64 * 128 :].reshape(-1, 4)
        assert np.array_equal(tensors["index_k"].reshape(-1, 128), keys[:length])
        assert np.array_equal(tensors["k_scale"].reshape(-1, 4), scales[:length])
        positions = tensors["positions"].view(np.int32)
        assert len(positions) == DUMPED
        assert positions[-1] == length - 1
        assert positions[0] >= random_model.CPU.index_topk
        heads = random_model.CPU.index_heads
        queries = seen["q"].view(torch.uint8).numpy()[positions]
        assert np.array_equal(tensors["index_q"].reshape(DUMPED, heads, 128), queries)
        gates = seen["gates"].squeeze(-1).numpy()[positions]
        assert np.array_equal(tensors["head_gates"].view(np.float32).reshape(DUMPED, heads), gates)


def test_the_study_runs_on_a_dump(guarded, folder: Path, monkeypatch, capsys) -> None:
    guarded.generate(prompt(2, 700), new=2)
    few = [each for each in selection.policies() if each[1].heads in (None, 7) and each[1].block_size == 64]
    monkeypatch.setattr(selection, "policies", lambda: few)
    files = sorted((folder / "dump").glob("*.safetensors"))[-2:]
    assert selection.main([*map(str, files), "--rows", "4"]) == 0
    assert "prefill" in capsys.readouterr().out


def test_a_broken_router_is_left_and_a_repaired_one_comes_back(guarded, folder: Path) -> None:
    broken, seeds = folder / "broken", iter(range(100, 1000))

    def serve(prefilled: int, decoded: int) -> dict[str, Any]:
        """Prompts with so many audited rows in a layer, one after another: those that share a call share its ROWS."""
        for _ in range(prompts := prefilled // ROWS):
            guarded.generate(prompt(next(seeds), LONG), new=1 + decoded // prompts)
        return guarded.misa()

    layers = {str(layer) for layer in range(random_model.CPU.layers)}
    assert guarded.misa()["ladder"] == {"prefill": {}, "decode": {}}, "nothing has moved while all was well"
    broken.touch()
    sunk = serve(CALM * WINDOW, WINDOW)
    assert {layer: state["rung"] for layer, state in sunk["ladder"]["prefill"].items()} == dict.fromkeys(layers, 1)
    assert sunk["ladder"]["decode"]["all"]["rung"] == 1
    assert sunk["declined"]["decode"]["recall-floor"] > 0
    broken.unlink()
    back = serve(2 * CALM * WINDOW, 2 * CALM * WINDOW)["ladder"]  # a window has begun with probes of what was broken
    assert {layer: state["rung"] for layer, state in back["prefill"].items()} == dict.fromkeys(layers, 0)
    assert back["decode"]["all"]["rung"] == 0
    log = (folder / "log").read_text()
    assert f"is under {FLOOR}; misa-error-residual-hier selects instead of misa" in log
    assert "prefill by misa keeps" in log


def test_dumps_stay_under_their_limit(guarded, folder: Path) -> None:
    guarded.flush()
    guarded.generate(prompt(3, 4000), new=2)  # half a MiB a layer: more than is left by now
    files = list((folder / "dump").iterdir())
    assert sum(os.stat(file).st_size for file in files) <= LIMIT
    assert guarded.misa()["dump"]["left_out"] > 0
    assert {file.name for file in files if not file.name.startswith("prompt-")} == {".rank-0.lock"}, "no part stays"
