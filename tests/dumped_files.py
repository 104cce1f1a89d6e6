"""Index tensors in files, as a server would have written them."""

from pathlib import Path

import torch

from sglang_misa import dump
from sglang_misa.policy_file import ModelIdentity

IDENTITY = ModelIdentity(
    architecture="DeepseekV32ForCausalLM", layers=4, index_heads=64, index_topk=2048, config_sha256="0" * 64
)


def dumped(path: Path, tensors: dict[str, torch.Tensor], layer: int, model: ModelIdentity = IDENTITY) -> Path:
    """The tensors of a prompt in a layer of `model`."""
    dump.write_new(path, tensors, {"model": model.model_dump_json(), "layer": str(layer), "prompt": "0"})
    return path
