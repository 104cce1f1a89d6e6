"""The pool's hooks on SGLang's real pool and its real memory budget."""

from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from recorders import fresh_recorder
from transformers import DeepseekV3Config

from sglang_misa import runtime
from sglang_misa.bench.host_cache import make_pool
from sglang_misa.config import PRESETS
from sglang_misa.kernels.layout import statistics_bytes
from sglang_misa.patches import pool as pool_hooks
from sglang_misa.patches import register

LAYERS, PAGES = 3, 5


@pytest.fixture(autouse=True)
def hooks(monkeypatch):
    fresh_recorder(monkeypatch, pool_hooks)
    armed = runtime.Runtime(PRESETS["misa"], 64, 2048, 8192, "cpu", 0, 1)
    monkeypatch.setattr(runtime, "_runtime", armed)
    register.apply(metadata.version("sglang"))
    yield
    register.undo()


def test_each_pool_owns_the_means_of_its_pages():
    target, draft = make_pool(PAGES, LAYERS)[0], make_pool(PAGES, LAYERS)[0]
    stats = [pool.misa_selector.engine.stats for pool in (target, draft)]
    assert stats[0] is not stats[1]
    assert [means.shape for means in stats[0].means] == [
        (buffer.shape[0], 128) for buffer in target.index_k_with_scale_buffer
    ]
    assert len(stats[0].means) == LAYERS
    assert pool_hooks.recorder.page_stats_bytes == sum(each.nbytes for each in stats)


def cell_size(num_layers):
    """DefaultPoolConfigurator._compute_cell_size of DeepSeek-V3.2 with a bf16 latent cache, in bytes a token."""
    from sglang.srt.model_executor.pool_configurator import DefaultPoolConfigurator
    from sglang.srt.runtime_context import get_parallel
    from sglang.srt.server_args import ServerArgs

    model = DeepseekV3Config(architectures=["DeepseekV32ForCausalLM"], index_head_dim=128, index_topk=2048)
    configurator = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=model, kv_lora_rank=512, qk_rope_head_dim=64),
        kv_cache_dtype=torch.bfloat16,
        use_mla_backend=True,
        is_draft_worker=False,
        mambaish_config=None,
        layer_info=SimpleNamespace(start_layer=0, end_layer=num_layers),
        server_args=ServerArgs(model_path="dummy", device="cpu"),
    )
    with get_parallel().override(attn_tp_size=1, attn_dcp_size=1):
        return DefaultPoolConfigurator.__new__(DefaultPoolConfigurator)._compute_cell_size(configurator, num_layers)


@pytest.mark.parametrize("num_layers", [1, 61])
def test_the_budget_pays_for_the_means(num_layers):
    with_means = cell_size(num_layers)
    register.undo()
    without = cell_size(num_layers)
    assert without == num_layers * (576 * 2 + 132)
    assert (with_means - without) * 64 >= statistics_bytes(None) * num_layers
    assert (with_means - without) <= without // 200, "half a percent"
