"""A DeepSeek-V3.2-shaped checkpoint with seeded random weights and a byte-level tokenizer, made on the spot: for tests.

It writes nonsense, but every part of DSA runs: latent attention, the lightning indexer, sparse selection, and mixtures
of experts. The index head gates have unequal sizes, as in trained models; nothing else is tuned.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SEED = 20260
INDEX_DIM, LATENT_DIM, ROPE_DIM, NOPE_DIM, V_DIM = 128, 512, 64, 128, 128  # fixed by SGLang's kernels
GATE_SPREAD = 1.5  # standard deviation of the log size of an index head's gate
BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
SPECIALS = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "


@dataclass(frozen=True)
class Shape:
    """Sizes of the checkpoint; the defaults suit two CPU cores."""

    hidden: int = 256
    layers: int = 2
    heads: int = 8
    q_rank: int = 256
    intermediate: int = 512
    dense_layers: int = 1  # the rest are mixtures of experts
    experts: int = 8
    index_heads: int = 64
    index_topk: int = 64
    context: int = 163840
    vocab: int = 320  # the tokenizer's 259 and some never used
    draft_layers: int = 0  # 1 for multi-token prediction; always a mixture of experts
    rope_theta: float = 10000.0
    yarn_factor: float = 40.0  # 1: plain rotary embedding


CPU = Shape()
# True indexer, attention and hidden sizes of one layer stack; the vocabulary is wide so that keys do not repeat.
GPU = Shape(
    hidden=2048,
    layers=4,
    heads=64,
    q_rank=1536,
    intermediate=4096,
    dense_layers=4,
    index_topk=2048,
    vocab=32000,
)
# What SGLang serves it with on a GPU: token ids in and out, no warm-up, nothing that a random model has no use for.
GPU_FLAGS = (
    "--skip-tokenizer-init --skip-server-warmup --grammar-backend none --sampling-backend pytorch "
    "--kv-cache-dtype bfloat16 --dsa-prefill-backend flashmla_sparse --dsa-decode-backend flashmla_sparse "
    "--cuda-graph-backend-prefill disabled"
)


def cache() -> Path:
    """Where this package keeps models and logs of its own making."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sglang-misa"


def ensure(folder: Path, shape: Shape) -> Path:
    """The checkpoint of `shape` under `folder`, written where it is not there; the same bytes every time."""
    target = folder / f"random-dsa-{'x'.join(str(v) for v in asdict(shape).values())}"
    if not (target / "config.json").exists():  # which is written last
        target.mkdir(parents=True, exist_ok=True)
        write(target, shape)
    return target


def write(folder: Path, shape: Shape) -> None:
    """Write weights, tokenizer and config.json of `shape` into an existing `folder`."""
    save_file(dict(weights(shape)), str(folder / "model.safetensors"), metadata={"format": "pt"})
    _write_tokenizer(folder, shape.context)
    (folder / "config.json").write_text(json.dumps(config(shape), indent=1), encoding="utf-8")


def config(shape: Shape) -> dict[str, Any]:
    """The Hugging Face config.json of `shape`."""
    return {
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        "vocab_size": shape.vocab,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "q_lora_rank": shape.q_rank,
        "kv_lora_rank": LATENT_DIM,
        "qk_rope_head_dim": ROPE_DIM,
        "qk_nope_head_dim": NOPE_DIM,
        "v_head_dim": V_DIM,
        "index_n_heads": shape.index_heads,
        "index_head_dim": INDEX_DIM,
        "index_topk": shape.index_topk,
        "intermediate_size": shape.intermediate,
        "moe_intermediate_size": shape.intermediate // 4,
        "first_k_dense_replace": shape.dense_layers,
        "moe_layer_freq": 1,
        "n_routed_experts": shape.experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": shape.draft_layers,
        "max_position_embeddings": shape.context,
        "rope_theta": shape.rope_theta,
        "rope_scaling": {
            "type": "yarn",
            "factor": shape.yarn_factor,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": round(shape.context / shape.yarn_factor),
        },
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def weights(shape: Shape) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every parameter: projections N(0, 1/fan_in) in bf16, norms 1, from one seeded generator."""
    generator = torch.Generator().manual_seed(SEED)

    def normal(rows: int, columns: int, std: float | None = None) -> torch.Tensor:
        values = torch.randn(rows, columns, generator=generator) * (columns**-0.5 if std is None else std)
        return values.bfloat16()

    def ones(size: int) -> torch.Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    def mlp(prefix: str, size: int) -> Iterator[tuple[str, torch.Tensor]]:
        yield f"{prefix}.gate_proj.weight", normal(size, shape.hidden)
        yield f"{prefix}.up_proj.weight", normal(size, shape.hidden)
        yield f"{prefix}.down_proj.weight", normal(shape.hidden, size)

    sizes = config(shape)

    def block(layer: int) -> Iterator[tuple[str, torch.Tensor]]:
        name = f"model.layers.{layer}"
        yield f"{name}.input_layernorm.weight", ones(shape.hidden)
        yield f"{name}.post_attention_layernorm.weight", ones(shape.hidden)
        attention = f"{name}.self_attn"
        yield f"{attention}.q_a_proj.weight", normal(shape.q_rank, shape.hidden)
        yield f"{attention}.q_a_layernorm.weight", ones(shape.q_rank)
        yield f"{attention}.q_b_proj.weight", normal(shape.heads * (NOPE_DIM + ROPE_DIM), shape.q_rank)
        yield f"{attention}.kv_a_proj_with_mqa.weight", normal(LATENT_DIM + ROPE_DIM, shape.hidden)
        yield f"{attention}.kv_a_layernorm.weight", ones(LATENT_DIM)
        yield f"{attention}.kv_b_proj.weight", normal(shape.heads * (NOPE_DIM + V_DIM), LATENT_DIM)
        yield f"{attention}.o_proj.weight", normal(shape.hidden, shape.heads * V_DIM)
        indexer = f"{attention}.indexer"
        yield f"{indexer}.wq_b.weight", normal(shape.index_heads * INDEX_DIM, shape.q_rank)
        yield f"{indexer}.wk.weight", normal(INDEX_DIM, shape.hidden)
        yield f"{indexer}.k_norm.weight", torch.ones(INDEX_DIM)
        yield f"{indexer}.k_norm.bias", torch.zeros(INDEX_DIM)
        spread = torch.exp(GATE_SPREAD * torch.randn(shape.index_heads, 1, generator=generator))
        yield f"{indexer}.weights_proj.weight", (normal(shape.index_heads, shape.hidden) * spread).bfloat16()
        if layer < shape.dense_layers:
            yield from mlp(f"{name}.mlp", shape.intermediate)
            return
        yield f"{name}.mlp.gate.weight", normal(shape.experts, shape.hidden)
        yield f"{name}.mlp.gate.e_score_correction_bias", torch.zeros(shape.experts)
        yield from mlp(f"{name}.mlp.shared_experts", sizes["moe_intermediate_size"])
        for expert in range(shape.experts):
            yield from mlp(f"{name}.mlp.experts.{expert}", sizes["moe_intermediate_size"])

    yield "model.embed_tokens.weight", normal(sizes["vocab_size"], shape.hidden, std=1.0)
    for layer in range(shape.layers):
        yield from block(layer)
    yield "model.norm.weight", ones(shape.hidden)
    yield "lm_head.weight", normal(sizes["vocab_size"], shape.hidden)
    for layer in range(shape.layers, shape.layers + shape.draft_layers):
        name = f"model.layers.{layer}"
        yield from block(layer)
        yield f"{name}.eh_proj.weight", normal(shape.hidden, 2 * shape.hidden)
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            yield f"{name}.{norm}.weight", ones(shape.hidden)


def _write_tokenizer(folder: Path, context: int) -> None:
    """One token a byte (ids 0-255), then the three special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in (BOS, EOS, PAD)])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_tokenizer_config(folder, context)


def write_tokenizer_config(folder: Path, context: int) -> None:
    """What SGLang reads beside tokenizer.json."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,  # SGLang's /tokenize answers with an error without it
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
