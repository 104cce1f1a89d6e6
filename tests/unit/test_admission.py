"""Every refusal once, on SGLang's real ServerArgs and a real Hugging Face config."""

import argparse
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.configs.model_config import is_deepseek_dsa
from sglang.srt.model_executor.cuda_graph_config import CudaGraphConfig, PhaseConfig
from sglang.srt.server_args import ServerArgs
from transformers import DeepseekV3Config, LlamaConfig

from sglang_misa import admission, versions
from sglang_misa.config import PRESETS, MisaConfig, SelectionPolicy
from sglang_misa.kernels.prefill.operands import Keys, Output, Rows
from sglang_misa.kernels.prefill.topk_blocks import topk_blocks
from sglang_misa.policy_file import LayerPolicy, ModelIdentity, PolicyFile


def model(**changes):
    v32 = {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}
    return DeepseekV3Config(architectures=["DeepseekV32ForCausalLM"], **{**v32, **changes})


def arguments(**changes):
    result = ServerArgs(model_path="dummy", page_size=64)
    for name, value in changes.items():
        setattr(result, name, value)
    return result


def candidate(hf=None, **changes):
    hf = hf or model()
    defaults = admission.Candidate(
        config=PRESETS["misa-hisa"],
        is_dsa=is_deepseek_dsa(hf),
        model=hf,
        arguments=arguments(),
        sglang="0.5.17",
        device="cuda",
        capability=(9, 0),
    )
    return dataclasses.replace(defaults, **changes)


def policy(**phases):
    return MisaConfig.model_validate(phases)


def layers_of(hf, **prefill):
    """A policy file of a model, with one prefill policy in its first layer."""
    layers = {str(layer): LayerPolicy() for layer in range(hf.num_hidden_layers)}
    layers["0"] = LayerPolicy(prefill=SelectionPolicy(**{"heads": 8, **prefill}))
    return PolicyFile(model=ModelIdentity.of(hf), created_by="a test", target_recall=0.9, length=8192, layers=layers)


TORCH = MisaConfig(prefill=PRESETS["misa"].prefill, backend="torch")

ADMITTED = {
    "V3.2 on Hopper": candidate(),
    "a policy file of this model": candidate(config=MisaConfig(layers=layers_of(model()))),
    "GLM-5's 32 heads": candidate(model(index_n_heads=32)),
    "PyTorch on another GPU, any head count": candidate(model(index_n_heads=16), config=TORCH, capability=(8, 9)),
    "CPU": candidate(model(index_n_heads=8), device="cpu", capability=None),
    "chain drafts": candidate(arguments=arguments(speculative_eagle_topk=1, speculative_num_draft_tokens=64)),
    "chain drafts by name": candidate(arguments=arguments(speculative_algorithm="EAGLE", speculative_eagle_topk=1)),
    "other drafts, with the user's word": candidate(
        config=PRESETS["hisa"].model_copy(update={"allow_unverified": True}),
        arguments=arguments(speculative_algorithm="UNO", speculative_eagle_topk=1),
    ),
    "no graphs": candidate(
        arguments=arguments(cuda_graph_config=CudaGraphConfig(decode=PhaseConfig(backend="disabled")))
    ),
    "any decode gate": candidate(config=policy(decode={"blocks": 64, "block_size": 128, "min_len": 1 << 20})),
    **{
        f"HiCache, {policy}, {layout}": candidate(
            arguments=arguments(enable_hierarchical_cache=True, hicache_write_policy=policy, hicache_mem_layout=layout)
        )
        for policy in ("write_through", "write_through_selective", "write_back")
        for layout in ("layer_first", "page_first", "page_first_direct")
    },
    "HiCache on files with a decode policy": candidate(
        arguments=arguments(hicache_storage_backend="file"), sglang="0.5.23"
    ),
    "HiCache's storage while decode is stock": candidate(
        config=PRESETS["misa"], arguments=arguments(hicache_storage_backend="file")
    ),
    "a version verified on the CPU, with the user's word": candidate(
        config=PRESETS["misa"].model_copy(update={"allow_unverified": True}), sglang="0.5.22"
    ),
    **{f"preset {name}": candidate(config=preset) for name, preset in PRESETS.items()},
    "SGLang's own backend by name": candidate(arguments=arguments(attention_backend="dsa")),
    "prefill blocks up to what a row's top-k holds": candidate(config=policy(prefill={"blocks": 187})),
    "PD while decode is stock": candidate(config=PRESETS["misa"], arguments=arguments(disaggregation_mode="prefill")),
    "decode behind a prefill server": candidate(
        arguments=arguments(disaggregation_mode="decode", disaggregation_transfer_backend="mooncake")
    ),
    "decode behind a prefill server by another transfer, with the user's word": candidate(
        config=PRESETS["hisa"].model_copy(update={"allow_unverified": True}),
        arguments=arguments(disaggregation_mode="decode", disaggregation_transfer_backend="nixl"),
    ),
}

REFUSED = {
    "not DSA": (candidate(LlamaConfig(architectures=["LlamaForCausalLM"])), "LlamaForCausalLM"),
    "V3 without an indexer": (candidate(DeepseekV3Config(architectures=["DeepseekV3ForCausalLM"])), "index_topk=None"),
    "head count": (candidate(model(index_n_heads=16)), "--misa-backend torch"),
    "head size": (candidate(model(index_head_dim=64)), "got 64"),
    "pooled keys": (candidate(model(index_kpool=4)), "index_kpool=4"),
    "pooled keys in words": (candidate(model(index_kpool="two")), "index_kpool=two"),
    "page size": (candidate(arguments=arguments(page_size=1)), "--page-size: expected 64, got 1"),
    "AMD": (candidate(device="hip", capability=None), "got 'hip'"),
    "NPU": (candidate(device="npu", capability=None), "got 'npu'"),
    "XPU": (candidate(device="xpu", capability=None), "got 'xpu'"),
    "kernels without a GPU": (
        candidate(config=policy(prefill={"heads": 8}, backend="kernels"), device="cpu", capability=None),
        "--misa-backend: expected auto or torch",
    ),
    "Blackwell": (candidate(capability=(10, 0)), "expected compute capability 9.0 (Hopper)"),
    "Ada": (candidate(capability=(8, 9)), "got 8.9"),
    "more heads than the model": (candidate(model(index_n_heads=4), config=TORCH), "prefill.heads: expected at most"),
    "fewer candidates than k": (candidate(model(index_topk=16384), config=PRESETS["misa-hier"]), "16384, got 8192"),
    "prefill blocks of routed heads on kernels": (
        candidate(config=policy(prefill={"heads": 8, "blocks": 64})),
        "prefill.blocks: expected all heads",
    ),
    "odd head counts on kernels": (candidate(config=policy(prefill={"heads": 7})), "(4, 8, 16, 32, 64)"),
    "an odd number of columns": (
        candidate(config=policy(prefill={"heads": 8, "residual": True})),
        "a residual counted as one, got 9",
    ),
    "decode heads alone": (
        candidate(config=policy(decode={"heads": 8})),
        "decode.heads: expected none without a sketch",
    ),
    "decode re-ranking of blocks on kernels": (
        candidate(config=policy(decode={"blocks": 64, "candidates": 4096})),
        "decode.candidates: expected none without a sketch",
    ),
    "blocks of sketches on kernels": (
        candidate(config=policy(decode={"blocks": 64, "sketch": 1, "candidates": 4096})),
        "decode.blocks: expected all with a sketch",
    ),
    "candidates of a part of a page": (
        candidate(config=policy(decode={"sketch": 1, "candidates": 4100})),
        "decode.candidates: expected a multiple of 64",
    ),
    "graphs in segments": (
        candidate(arguments=arguments(cuda_graph_config=CudaGraphConfig(decode=PhaseConfig(backend="breakable")))),
        "--cuda-graph-backend-decode: expected full",
    ),
    "more drafts than a page": (
        candidate(arguments=arguments(speculative_num_draft_tokens=65)),
        "--speculative-num-draft-tokens: expected at most 64, got 65",
    ),
    "more candidates than a thread block holds": (
        candidate(config=policy(prefill={"heads": 8, "candidates": 20480})),
        "prefill.candidates: expected at most 16384",
    ),
    "more decode blocks than a row's top-k holds": (
        candidate(config=policy(decode={"blocks": 300, "block_size": 128})),
        "decode.blocks: expected (blocks + 1) × block_size of at most 32768",
    ),
    "more prefill blocks than a row's top-k holds, beside k / 2": (
        candidate(config=policy(prefill={"blocks": 188})),
        "prefill.blocks: expected (blocks + 1) × block_size of at most 48128 tokens on GPU kernels, got 48384",
    ),
    "a version verified on a CPU only": (candidate(sglang="0.5.22"), "or add --misa-allow-unverified"),
    "an unknown version": (
        candidate(config=policy(allow_unverified=True), sglang="0.5.18"),
        "got 0.5.18; install sglang==0.5.23",
    ),
    "a policy file beside a model without its sizes": (
        candidate(
            SimpleNamespace(architectures=["X"], index_topk=2048, index_n_heads=64, index_head_dim=128),
            is_dsa=True,
            config=MisaConfig(layers=layers_of(model())),
        ),
        "config.json: num_hidden_layers: expected a valid integer, got None",
    ),
    "a policy file of another model": (
        candidate(model(hidden_size=512), config=MisaConfig(layers=layers_of(model()))),
        "--misa-policy: expected a file of a model with config_sha256=",
    ),
    "a policy file of fewer layers": (
        candidate(config=MisaConfig(layers=layers_of(model(num_hidden_layers=2)))),
        "--misa-policy: expected a file of a model with layers=61, got 2",
    ),
    "a policy of a layer without a kernel": (
        candidate(config=MisaConfig(layers=layers_of(model(), heads=9))),
        "on GPU kernels, a residual counted as one, got 9",
    ),
    "a dump of a user unknown here": (
        candidate(config=policy(dump={"folder": "~no-such-user/dump"})),
        "--misa-dump: expected a folder of a user of this machine, got ~no-such-user/dump",
    ),
    "a dump that others could read": (
        candidate(config=policy(dump={"folder": "/"})),
        "--misa-dump: expected a folder of this user alone, mode 0700",
    ),
    "a dump of a layer that is not there": (
        candidate(model(num_hidden_layers=4), config=policy(dump={"folder": "/nowhere/d", "layers": [0, 4]})),
        "--misa-dump-layers: expected layers under the model's 4, got 4",
    ),
    "forced tokens": (candidate(model(index_local_tokens=8)), "got index_local_tokens"),
    **{
        name: (candidate(arguments=arguments(**{name: value})), f"--{name.replace('_', '-')}: expected")
        for name, value in {
            "attention_backend": "fa3",
            "prefill_attention_backend": "flashinfer",
            "decode_attention_backend": "trtllm_mla",
            "enable_nvidia_megakernel": True,
            "enable_dsa_fused_indexer": True,
            "enable_mixed_chunk": True,
            "enable_two_batch_overlap": True,
            "enable_deterministic_inference": True,
            "startup_weight_load_mode": "overlap",
            "enable_unified_memory": True,
            "enable_unified_cache_external_linker": True,
            "enable_kv_cache_sharding": True,
            "enable_prefill_cp": True,
            "attn_cp_size": 2,
            "dcp_size": 2,
            "enable_dsa_cache_layer_split": True,
            "enable_hisparse": True,
            "enable_flexkv": True,
            "enable_lmcache": True,
            "radix_cache_backend": "flexkv",
            "speculative_eagle_topk": 4,
            "enable_torch_compile": True,
            "pp_size": 2,
            "enable_pdmux": True,
            "hicache_mem_layout": "page_first_kv_split",
            "hicache_io_backend": "kernel_ascend",
            "hicache_storage_backend": "mooncake",
            "hicache_host_memory_mode": "buffer_only",
            "disaggregation_mode": "prefill",
        }.items()
    },
    **{
        name: (
            candidate(
                arguments=arguments(disaggregation_mode="decode", **{name: value}), device="cpu", capability=None
            ),
            f"--{name.replace('_', '-')}",
        )
        for name, value in {
            "speculative_algorithm": "EAGLE",
            "enable_hierarchical_cache": True,
            "disaggregation_decode_enable_radix_cache": True,
            "disaggregation_decode_enable_offload_kvcache": True,
        }.items()
    },
    "drafts that branch though each match has one continuation": (
        candidate(
            arguments=arguments(
                speculative_algorithm="NGRAM", speculative_ngram_max_bfs_breadth=1, speculative_eagle_topk=1
            )
        ),
        "--speculative-algorithm: expected none or one whose drafts are a chain, got NGRAM",
    ),
    "drafts that nobody tried": (
        candidate(arguments=arguments(speculative_algorithm="UNO", speculative_eagle_topk=1)),
        "--speculative-algorithm: expected none or one of EAGLE, EAGLE3, NEXTN, STANDALONE, got UNO",
    ),
    "HiCache on files of a version where it was not tried": (
        candidate(arguments=arguments(hicache_storage_backend="file")),
        "--hicache-storage-backend: expected None with a decode policy on SGLang 0.5.17, got 'file'",
    ),
    "decode behind a prefill server by another transfer": (
        candidate(arguments=arguments(disaggregation_mode="decode", disaggregation_transfer_backend="nixl")),
        "--disaggregation-transfer-backend: expected mooncake with a decode policy, got nixl",
    ),
}


@pytest.mark.parametrize("name", ADMITTED)
def test_admits(name):
    admission.check(ADMITTED[name])


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_with_one_reason(name):
    subject, words = REFUSED[name]
    (problem,) = admission.problems(subject)
    assert words in problem
    assert "got" in problem
    assert ";" in problem, "says what to do"


def test_every_argument_rule_is_exercised_and_names_a_real_flag():
    rules = admission.ARGUMENTS + admission.DECODE_ARGUMENTS + admission.TRANSFER_ARGUMENTS
    assert {rule.name for rule in rules} <= set(REFUSED)
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    flags = {word for action in parser._actions for word in action.option_strings}
    newer = {rule.flag for rule in rules if not hasattr(arguments(), rule.name)}
    assert {rule.flag for rule in rules} - newer <= flags
    assert not newer or versions.installed() != versions.SUPPORTED[-1], "the newest version has them all"


def test_all_reasons_come_together():
    subject = candidate(
        model(index_n_heads=16), arguments=arguments(dcp_size=2, enable_lmcache=True), capability=(8, 0)
    )
    with pytest.raises(admission.AdmissionError) as caught:
        admission.check(subject)
    text = str(caught.value)
    for words in ("index_n_heads", "--dcp-size", "--enable-lmcache", "compute capability"):
        assert words in text
    assert len(caught.value.problems) == 4


def test_prefill_blocks_are_those_that_the_kernel_takes():
    """One token block more than admission's limit is what the kernel refuses, and at the limit it does not."""
    topk, size = 2048, 256

    def admitted(blocks):
        return not list(admission._prefill_kernels(SelectionPolicy(blocks=blocks, block_size=size), topk))

    def taken(blocks):
        rows, one = Rows(torch.empty(1, 64, 128), *[torch.empty(1)] * 3), torch.empty(1)
        output = Output(torch.empty(1, topk, dtype=torch.int32))
        with pytest.raises(ValueError, match="expected") as caught:  # these are no tensors of a GPU
            topk_blocks(rows, Keys(one, one), one, blocks, size, output)
        return not str(caught.value).startswith("blocks:")

    assert [admitted(blocks) for blocks in range(8, 300)] == [taken(blocks) for blocks in range(8, 300)]


@pytest.mark.parametrize("version", ["0.5.16", "0.5.18", "0.5.17.post1", "0.0.0"])
def test_refuses_an_unknown_version(version):
    with pytest.raises(admission.AdmissionError) as caught:
        admission.check_version(version)
    for words in ("0.5.17 (CPU and GPU)", "0.5.22 (CPU)", f"got {version}; install sglang==0.5.23"):
        assert words in str(caught.value)


@pytest.mark.parametrize("version", versions.SUPPORTED)
def test_admits_a_supported_version(version):
    admission.check_version(version)
    admission.check(candidate(sglang=version, device="cpu", capability=None))
