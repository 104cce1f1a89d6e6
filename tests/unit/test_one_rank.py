"""One rank of DeepSeek-V3.2 with random weights: its sizes, and weights under which every part has something to do."""

import pytest
import torch
from sglang.srt.model_loader import loader

from sglang_misa.bench import one_rank

FAN_IN = 512


class Layer(torch.nn.Module):
    """Parameters as SGLang's fp8 layers hold them, and what stands between."""

    def __init__(self, rows_before_gates: int):
        super().__init__()
        codes = torch.zeros(3, 256, FAN_IN).to(torch.float8_e4m3fn)
        self.w13_weight = torch.nn.Parameter(codes, requires_grad=False)
        self.w13_weight_scale_inv = torch.nn.Parameter(torch.zeros(3, 2, FAN_IN // one_rank.BLOCK))
        self.norm = torch.nn.LayerNorm(64)
        self.k_scale = torch.nn.Parameter(torch.tensor(-1.0))
        self.weights_proj = torch.nn.Linear(FAN_IN, rows_before_gates + one_rank.HEADS, bias=False)
        self.register_buffer("ids", torch.arange(4))


@pytest.fixture(params=[0, 128], ids=["gates alone", "gates behind wk"])
def layer(request):
    layer = Layer(request.param)
    one_rank.fill(layer)
    return layer


def test_activations_keep_their_scale(layer):
    blocks = layer.w13_weight_scale_inv.repeat_interleave(one_rank.BLOCK, 1).repeat_interleave(one_rank.BLOCK, 2)
    experts = layer.w13_weight.float() * blocks
    out = experts @ torch.randn(FAN_IN, generator=torch.Generator().manual_seed(0))
    assert out.std().item() == pytest.approx(1, rel=0.1)
    assert (experts[0] != experts[1]).float().mean() > 0.9
    assert [layer.norm.weight.unique(), layer.norm.bias.unique(), layer.k_scale] == [1, 0, 1]
    assert layer.ids.tolist() == [0, 1, 2, 3]


def test_gates_are_unequal_and_keys_are_not(layer):
    sizes = layer.weights_proj.weight.std(1) * FAN_IN**0.5
    keys, gates = sizes[: -one_rank.HEADS], sizes[-one_rank.HEADS :]
    assert gates.max() > 5 * gates.median()
    torch.testing.assert_close(keys, torch.ones_like(keys), rtol=0.2, atol=0)


def test_shares_make_up_the_model():
    config = one_rank.config(30)
    assert (config["num_hidden_layers"], config["index_n_heads"]) == (30, 64)
    for name, whole in one_rank.DIVIDED.items():
        assert config[name] * one_rank.RANKS == whole, name
        assert one_rank.config(30, ranks=2)[name] == 2 * config[name]


def test_ranks_and_layers_are_read_off_the_models_folder():
    assert one_rank.share_of("/cache/" + one_rank.FOLDER.format(2, 30)) == (2, 30)
    assert one_rank.share_of("deepseek-ai/DeepSeek-V3.2") is None


def test_sglang_calls_what_is_replaced():
    assert "initialize_dummy_weights" in loader.DummyModelLoader.load_model.__code__.co_names


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--layers", "62"], "--layers: expected 1 to 61, got 62"),
        (["--tp", "9"], "--tp: expected 1 to 8, got 9"),
        ([], "expected a GPU for weights in fp8, got none"),
    ],
)
def test_refusals(words, said, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit) as stopped:
        one_rank.main(words)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
