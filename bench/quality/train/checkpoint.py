"""The trained model as a folder that SGLang serves: safetensors, config.json, tokenizer."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from sglang_misa import random_model
from sglang_misa.bench.quality.train.model import DsaModel
from sglang_misa.random_model import LATENT_DIM


def export(model: DsaModel, tokenizer: Tokenizer, folder: Path, note: str) -> None:
    """Write `folder`. note: how the weights came about, kept in the safetensors' metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "trained": note}
    save_file(dict(tensors(model)), str(folder / "model.safetensors"), metadata=metadata)
    config = random_model.config(model.shape)
    specials = {name: tokenizer.token_to_id(word) for name, word in random_model.SPECIALS.items()}
    (folder / "config.json").write_text(json.dumps({**config, **specials}, indent=1) + "\n", encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
    random_model.write_tokenizer_config(folder, model.shape.context)


@torch.no_grad()
def tensors(model: DsaModel) -> dict[str, Tensor]:
    """Parameters by their published names, in bf16 (norms of index keys in fp32), the latent filled up to 512."""
    found = {}
    for name, value in model.state_dict().items():
        value = value.detach().cpu()
        rank = model.model.layers[0].self_attn.rank
        if name.endswith("kv_a_proj_with_mqa.weight"):
            low, turned = value[:rank], value[rank:]
            value = torch.cat((F.pad(low, (0, 0, 0, LATENT_DIM - rank)), turned))
        elif name.endswith("kv_a_layernorm.weight"):  # the mean of squares now counts zeros too
            value = F.pad(value, (0, LATENT_DIM - rank)) * math.sqrt(rank / LATENT_DIM)
        elif name.endswith("kv_b_proj.weight"):
            value = F.pad(value, (0, LATENT_DIM - rank))
        found[name] = value.float().contiguous() if "indexer.k_norm" in name else value.bfloat16().contiguous()
    return found
