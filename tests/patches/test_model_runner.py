"""Which indexer ends a decode step, on modules with SGLang's own Indexer class, and what an armed rank logs."""

import logging

import pytest
from sglang.srt.layers.attention.dsa.dsa_indexer import Indexer
from torch import nn

from sglang_misa.config import PRESETS
from sglang_misa.patches.model_runner import _mark_last, _tell


class Attention(nn.Module):
    """What SGLang's attention says of its indexer."""

    def __init__(self, layer_id, skip_topk, is_nextn=False):
        super().__init__()
        self.indexer = Indexer.__new__(Indexer)
        nn.Module.__init__(self.indexer)
        self.indexer.layer_id = layer_id
        self.skip_topk, self.is_nextn = skip_topk, is_nextn


@pytest.mark.parametrize(
    ("layers", "last"),
    [
        ([Attention(i, False) for i in range(3)], 2),
        ([Attention(i, i % 2 == 1) for i in range(4)], 2),  # layers 1 and 3 take their neighbour's selection
        ([Attention(0, True, is_nextn=True)], 0),  # a draft model's only layer runs when nothing was handed to it
    ],
)
def test_the_last_indexer_that_runs_ends_the_step(layers, last):
    _mark_last(nn.ModuleList(layers))
    assert [layer.indexer.layer_id for layer in layers if layer.indexer.misa_last] == [last]


@pytest.mark.parametrize(("alone", "warned"), [(True, ["verify_ranks=64 (one rank)"]), (False, [])])
def test_ranks_that_have_nobody_to_compare_with_are_told(caplog, alone, warned):
    _tell(PRESETS["faithful"].model_copy(update={"verify_ranks": 64}), alone=alone, context=1 << 17)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [f"without effect on this selection: {each}" for each in warned]


@pytest.mark.parametrize(("preset", "told"), [("misa", "prefill misa, decode dsa"), ("dsa", "leaves both phases")])
def test_what_selects_is_told(caplog, preset, told):
    caplog.set_level(logging.INFO)
    _tell(PRESETS[preset], alone=True, context=1 << 17)
    (said,) = caplog.messages
    assert told in said
