"""Servers that must not start: each says why, and none of them serves stock DSA instead."""

import shutil
import socket

import pytest
import torch
from safetensors.torch import save_file

pytestmark = pytest.mark.serving

FOREIGN_HOOK = """
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

def around(original, *args, **kwargs):
    return original(*args, **kwargs)

def load():
    target = "sglang.srt.layers.attention.dsa.dsa_indexer.Indexer._get_topk_ragged"
    HookRegistry.register(target, around, HookType.AROUND)
"""


def start(launch, model, **environ):
    """A launch that would serve if nothing stopped it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = f"--misa-preset misa-hier --misa-prefill-candidates 64 --device cpu --port {port} --model-path".split()
    return launch(*words, model, **environ)


def test_a_second_plugin_on_the_same_hook(launch, model, tmp_path):
    folder = tmp_path / "foreign-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[sglang.srt.plugins]\nforeign = foreign_plugin:load\n")
    (tmp_path / "foreign_plugin.py").write_text(FOREIGN_HOOK)
    ended = start(launch, model, PYTHONPATH=str(tmp_path))
    assert ended.returncode != 0
    assert "sglang-misa stops the launch" in ended.stdout
    assert "_get_topk_ragged" in ended.stdout


def test_nan_weights_in_an_indexer(launch, model, weights, tmp_path):
    folder = tmp_path / "nan"
    shutil.copytree(model, folder)
    name = "model.layers.1.self_attn.indexer.wk.weight"
    broken = weights[name].clone()
    broken[0, 0] = torch.nan
    save_file({**weights, name: broken}, str(folder / "model.safetensors"), metadata={"format": "pt"})
    ended = start(launch, folder)
    assert ended.returncode != 0
    assert "model.layers.1.self_attn.indexer.wk.weight: expected finite weights" in ended.stdout
