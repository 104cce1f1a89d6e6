"""What selections keep of DSA's tokens on trained indexers: figures that a later change must not lose unseen.

Three layers of a small language model at 128K, a dozen rows each; the bounds lie a little under what was measured.
"""

from pathlib import Path

import pytest
import torch

from sglang_misa.bench import selection
from sglang_misa.config import PRESETS, Phase, SelectionPolicy

TRAINED = Path(__file__).parents[3] / "shared/trained"
LAYERS = [TRAINED / f"layer{number}.safetensors" for number in (0, 2, 4)]
ROWS, LENGTH = 4, 131072

pytestmark = pytest.mark.skipif(not all(path.exists() for path in LAYERS), reason=f"needs {TRAINED}")
WEIGHT = SelectionPolicy(heads=7, router="weight", residual=True, block_size=1024)
CASES: dict[str, tuple[Phase, SelectionPolicy, float]] = {
    "misa": ("prefill", PRESETS["misa"].prefill, 0.760),
    "peak over 256": ("prefill", SelectionPolicy(heads=8, router="peak"), 0.870),
    "seven heads by error": ("prefill", PRESETS["fast"].prefill.model_copy(update={"heads": 7}), 0.940),
    "fast prefill": ("prefill", PRESETS["fast"].prefill, 0.930),
    "faithful prefill": ("prefill", PRESETS["faithful"].prefill, 0.985),
    "weight over 1024": ("prefill", WEIGHT, 0.920),
    "weight over 1024, C = 4096": ("prefill", WEIGHT.model_copy(update={"candidates": 4096}), 0.980),
    "hisa decode": ("decode", PRESETS["hisa"].decode, 0.600),
    "1-bit sketches": ("decode", PRESETS["fast"].decode, 0.930),
    "15 heads on 1-bit sketches": ("decode", PRESETS["fast"].decode.model_copy(update={"heads": 15}), 0.940),
    "2-bit sketches": ("decode", PRESETS["faithful"].decode, 0.993),
}


@pytest.fixture(scope="module")
def shares() -> selection.Shares:
    """What each policy keeps in every row of every layer; policies with candidates under their own name."""
    wanted = [(phase, plain(policy).model_copy(update={"candidates": None})) for phase, policy, _ in CASES.values()]
    found = [selection.measure(selection.Layer.load(path, ROWS), LENGTH, [*dict.fromkeys(wanted)]) for path in LAYERS]
    return {key: torch.cat([layer[key] for layer in found]) for key in found[0]}


def plain(policy: SelectionPolicy) -> SelectionPolicy:
    return policy.model_copy(update={"min_len": 0})  # the gate is not compared


@pytest.mark.parametrize("name", CASES)
def test_a_selection_keeps_what_it_kept(name: str, shares: selection.Shares) -> None:
    phase, policy, bound = CASES[name]
    assert float(shares[phase, plain(policy)].mean()) >= bound
