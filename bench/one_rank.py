"""Serve what one of eight GPUs computes for DeepSeek-V3.2, with random weights: a full model's times on one GPU.

    python -m sglang_misa.bench.one_rank --layers 30 --misa-preset misa-hisa --port 30000

Every size that tensor parallelism divides is an eighth (attention heads, feed-forward sizes, vocabulary); the rest is
DeepSeek-V3.2's own, fp8 weights and all 64 index heads included, so that layers cost what they cost there. What is left
out is the communication of the ranks. With `--tp N` it is N of the eight, with the communication among them. A layer
takes 1.4 GB of each GPU; all 61 want an H200. Other flags are `sglang_misa.launch_server`'s; text is nonsense, so there
is no tokenizer (`bench.load --text ids`).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sglang_misa import random_model

RANKS, LAYERS, HEADS = 8, 61, random_model.Shape.index_heads
FOLDER = f"deepseek-v3.2-{{}}-of-{RANKS}-ranks-{{}}"  # ranks and layers: what the server tells as its model
BLOCK = 128  # side of the square of weights that shares a scale
# DeepSeek-V3.2's config.json where it is not what `random_model` writes; the sizes below are divided by the ranks.
DEEPSEEK = {
    "hidden_size": 7168,
    "q_lora_rank": 1536,
    "index_topk": 2048,
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    },
}
DIVIDED = {
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "vocab_size": 129280,
}


def config(layers: int = LAYERS, ranks: int = 1) -> dict[str, Any]:
    """config.json of the first `layers` layers of so many ranks."""
    share = {name: size * ranks // RANKS for name, size in DIVIDED.items()}
    return random_model.config(random_model.Shape(layers=layers)) | DEEPSEEK | share


def share_of(model_path: str) -> tuple[int, int] | None:
    """(ranks, layers) of a model that this program wrote; None for any other."""
    match = re.fullmatch(FOLDER.format(r"(\d+)", r"(\d+)"), Path(model_path).name)
    return None if match is None else (int(match[1]), int(match[2]))


def fill(model: torch.nn.Module) -> None:
    """Random weights that keep activations at unit scale, in place of SGLang's `initialize_dummy_weights`.

    That one draws from ±0.001, which is 0 in fp8: an indexer's scores would all be equal, and its top-k a special case.
    """
    state = model.state_dict()
    device = next(iter(state.values())).device
    generator = torch.Generator(device).manual_seed(random_model.SEED)
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            continue
        if name.endswith("_scale_inv"):  # the weight's codes have a standard deviation of 1
            tensor.fill_(state[name.removesuffix("_scale_inv")].shape[-1] ** -0.5)
        elif tensor.dim() < 2:
            tensor.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            # an expert at a time: a draw of all of them in bf16 would not fit beside the weights
            fp8 = tensor.element_size() == 1
            std = 1.0 if fp8 or "embed" in name else tensor.shape[-1] ** -0.5
            for matrix in tensor.view(-1, *tensor.shape[-2:]):
                draw = torch.randn(matrix.shape, generator=generator, device=device, dtype=torch.bfloat16)
                if "weights_proj" in name:  # the index heads' gates, of unequal sizes as in trained models
                    spread = torch.randn(HEADS, 1, generator=generator, device=device)
                    draw[-HEADS:] *= torch.exp(random_model.GATE_SPREAD * spread)  # SGLang may put wk above them
                matrix.copy_(draw * std)


def main(argv: Sequence[str]) -> int:
    """Serve until it ends; returns the exit status of `sglang_misa.launch_server`."""
    from sglang_misa import launch_server

    parser = argparse.ArgumentParser(
        prog="python -m sglang_misa.bench.one_rank",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--layers", type=int, default=LAYERS, help="how many of the 61 layers to serve")
    parser.add_argument("--tp", type=int, default=1, help="GPUs, each with the share of one of the eight ranks")
    options, rest = parser.parse_known_args(argv)
    if not 1 <= options.layers <= LAYERS:
        parser.error(f"--layers: expected 1 to {LAYERS}, got {options.layers}")
    if not 1 <= options.tp <= RANKS:
        parser.error(f"--tp: expected 1 to {RANKS}, got {options.tp}")
    if not torch.cuda.device_count():  # is_available() would begin CUDA here, and the launcher forks
        parser.error("expected a GPU for weights in fp8, got none; a CPU has launch_server --demo")
    folder = random_model.cache() / FOLDER.format(options.tp, options.layers)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(options.layers, options.tp), indent=1), encoding="utf-8")
    # DeepGEMM would build its kernels for every batch size, 10 to 20 minutes; as they are needed it takes seconds each.
    os.environ.setdefault("SGLANG_JIT_DEEPGEMM_PRECOMPILE", "0")
    words = [f"--model-path={folder}", "--load-format=dummy", "--skip-tokenizer-init", f"--tp={options.tp}"]
    return launch_server.main([*words, *rest])


if __name__ == "__mp_main__":  # a process of SGLang, which imports this module again; one of them loads the model
    from sglang.srt.model_loader import loader

    loader.initialize_dummy_weights = fill
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
