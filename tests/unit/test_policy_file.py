"""A policy for each layer: the file reaches every process, and every mistake in it is named."""

import argparse
import json
import subprocess

import pytest

from sglang_misa import config, flags
from sglang_misa.config import ConfigError, MisaConfig


def from_flags(*words):
    parser = argparse.ArgumentParser()
    flags.add_cli_flags(parser)
    return flags.from_flags(parser.parse_args(words))


IDENTITY = {
    "architecture": "DeepseekV32ForCausalLM",
    "layers": 3,
    "index_heads": 64,
    "index_topk": 2048,
    "config_sha256": "0" * 64,
}
LAYERS = {str(layer): {"prefill": {"heads": 8}} for layer in range(3)}


def policy_file(layers=LAYERS, **changes):
    return {"model": IDENTITY, "created_by": "a test", "target_recall": 0.9, "length": 8192, "layers": layers} | changes


WRONG_FILES = {
    "an unknown name": (policy_file({"0": {"prefil": {}}}), "layers.0.prefil: unknown name, did you mean prefill?"),
    "a name in a policy": (
        policy_file(LAYERS | {"1": {"decode": {"head": 8}}}),
        "layers.1.decode.head: unknown name, did you mean heads?",
    ),
    "missing layers": (policy_file({"1": {}}), "expected policies for layers 0 to 2, got none for 0, 2"),
    "a layer too many": (policy_file(LAYERS | {"3": {}}), "expected policies for layers 0 to 2, got others, 3"),
    "more layers than a model has": (
        policy_file(model=IDENTITY | {"layers": 10**9}),
        "model.layers: expected a number less than or equal to 4096",
    ),
    "layers that are no object": (policy_file([{}, {}, {}]), "layers: expected an object, got [{}, {}, {}]"),
    "no model": ({"layers": LAYERS}, "model: expected a value, got none; add it"),
    "a policy that cannot be": (
        policy_file(LAYERS | {"2": {"prefill": {"heads": 65}}}),
        "layer 2: prefill.heads: expected at most the model's 64 index heads, got 65",
    ),
    "gates that differ": (
        policy_file({str(n): {"decode": {"blocks": 64, "min_len": 4096 * n}} for n in range(3)}),
        "decode.min_len: expected one value in every layer",
    ),
    "gates of tokens that differ": (
        policy_file({str(n): {"decode": {"blocks": 64, "min_tokens": 4096 + n}} for n in range(3)}),
        "decode.min_tokens: expected one value in every layer",
    ),
    "a gate of tokens in some layers alone": (
        policy_file({str(n): {"decode": {"blocks": 64, "min_tokens": 4096 * (n == 1)}} for n in range(3)}),
        "decode.min_tokens: expected one value in every layer, as the gate of tokens is the step's, too, got 0, 4096",
    ),
    "half a character": (policy_file(LAYERS | {"\ud800": {}}), "got others, \\ud800"),
    "half a character in a text": (policy_file(created_by="\ud800"), "created_by: expected a valid string"),
    "half a character in the model": (
        policy_file(model=IDENTITY | {"architecture": "\ud800"}),
        "model.architecture: expected a valid string",
    ),
    "a cost without an end": (
        policy_file(LAYERS | {"1": {"recall": {"prefill": {"calibrated": 1, "cost": float("inf")}}}}),
        "layers.1.recall.prefill.cost: expected a finite number, got inf",
    ),
    "more than a process can be given": (
        policy_file(created_by="long " * 40_000),
        "SGLANG_MISA_CONFIG: expected at most 131052 bytes of settings",
    ),
    "sketches that differ": (
        policy_file({str(n): {"decode": {"sketch": max(n, 1), "candidates": 8192}} for n in range(3)}),
        "decode.sketch: expected one value in every layer",
    ),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_mistake_in_a_policy_file_is_named(name, tmp_path):
    content, words = WRONG_FILES[name]
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError) as caught:
        from_flags("--misa-policy", str(path))
    assert words in "\n".join(caught.value.problems)


def test_a_policy_file_travels_and_gives_each_layer_its_own(tmp_path):
    layers = {"0": {}, "1": {"prefill": {"heads": 8}}, "2": {"prefill": {"heads": 16, "min_len": 100}}}
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(policy_file(layers)))
    chosen = from_flags("--misa-policy", str(path), "--misa-audit-rows", "4")
    assert MisaConfig.from_env({config.ENV: chosen.to_json()}) == chosen
    assert [chosen.policy("prefill", layer).heads for layer in (0, 1, 2, None)] == [None, 8, 16, None]
    assert (chosen.gate("prefill"), chosen.gate("decode"), chosen.name("prefill")) == (100, None, "dsa|misa")
    assert config.preset_name(chosen) is None
    for beside in (["--misa-prefill-heads", "8"], ["--misa-decode-min-len", "9"], ["--misa-decode", "dsa"]):
        with pytest.raises(ConfigError, match=f"{beside[0]}: expected none beside --misa-policy"):
            from_flags("--misa-policy", str(path), *beside)
    with pytest.raises(ConfigError, match="beside the policies of layers"):
        MisaConfig.from_mapping({"layers": policy_file(), "prefill": {"heads": 8}}, "here")


def test_a_file_of_every_layer_of_a_large_model_reaches_a_process(tmp_path):
    """With every policy apart and measured, as calibrate writes it."""
    recall = {"calibrated": 1 / 3, "held_out": 1 / 7, "cost": 1 / 9}
    policy = {"heads": 3, "router": "error", "residual": True, "block_size": 512}
    layers = {
        str(layer): {
            "prefill": policy | {"candidates": 4096 + layer},
            "decode": policy | {"sketch": 2, "candidates": 4096 + layer},
            "recall": {"prefill": recall, "decode": recall},
        }
        for layer in range(256)
    }
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(policy_file(layers, model=IDENTITY | {"layers": len(layers)})))
    text = from_flags("--misa-policy", str(path)).to_json()
    assert MisaConfig.from_json(text, "here") == from_flags("--misa-policy", str(path))
    subprocess.run(["true"], env={config.ENV: text}, check=True)
