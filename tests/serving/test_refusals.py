"""Servers that must not start: each says why, and none of them serves stock DSA instead."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sglang_misa.procs import free_port

pytestmark = pytest.mark.serving

BROKEN = "model.layers.1.self_attn.indexer.wk.weight"
FOREIGN_HOOK = """
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

def around(original, *args, **kwargs):
    return original(*args, **kwargs)

def load():
    target = "sglang.srt.layers.attention.dsa.dsa_indexer.Indexer._get_topk_ragged"
    HookRegistry.register(target, around, HookType.AROUND)
"""


def second_plugin(folder: Path) -> None:
    """A plugin that hooks what is ours, as pip would install it into `folder`."""
    installed = folder / "foreign-1.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[sglang.srt.plugins]\nforeign = foreign_plugin:load\n")
    (folder / "foreign_plugin.py").write_text(FOREIGN_HOOK)


def nan_weights(model: Path, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """A copy of the model with a NaN in an indexer."""
    shutil.copytree(model, folder)
    broken = weights[BROKEN].clone()
    broken[0, 0] = torch.nan
    save_file({**weights, BROKEN: broken}, str(folder / "model.safetensors"), metadata={"format": "pt"})


@pytest.fixture(scope="module")
def refused(begin, model, weights, tmp_path_factory) -> dict[str, subprocess.CompletedProcess[str]]:
    """Launches that would serve if nothing stopped them, at once: each imports SGLang for most of its time."""
    folder = tmp_path_factory.mktemp("refused")
    second_plugin(folder / "plugin")
    nan_weights(model, weights, folder / "nan")

    (folder / "open.yaml").write_text("host: 0.0.0.0")

    def launch(model: Path, *more: str, **environ: str) -> Callable[[], subprocess.CompletedProcess[str]]:
        words = f"--misa-preset misa-hier --misa-prefill-candidates 64 --device cpu --port {free_port()} --model-path"
        return begin(*words.split(), model, *more, **environ)

    launches = {
        "plugin": launch(model, PYTHONPATH=str(folder / "plugin")),
        "nan": launch(folder / "nan"),
        "open": launch(model, "--config", str(folder / "open.yaml")),
    }
    return {name: end() for name, end in launches.items()}


def test_a_second_plugin_on_the_same_hook(refused):
    assert refused["plugin"].returncode != 0
    assert "sglang-misa stops the launch" in refused["plugin"].stdout
    assert "_get_topk_ragged" in refused["plugin"].stdout


def test_nan_weights_in_an_indexer(refused):
    assert refused["nan"].returncode != 0
    assert f"{BROKEN}: expected finite weights" in refused["nan"].stdout


def test_an_open_host_in_sglangs_own_file(refused):
    assert refused["open"].returncode == 2
    assert "--host: expected a key, or a loopback address, got 0.0.0.0 without one" in refused["open"].stdout
    assert "Traceback" not in refused["open"].stdout
