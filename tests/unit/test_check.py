"""`--check`: says what would run and refuses what a launch would refuse, from flags and config.json."""

import argparse
import json
import subprocess
import sys

import pytest
from sglang.srt.server_args import ServerArgs

from sglang_misa import check, launch_server, random_model
from sglang_misa.config import ENV, PRESETS

FAITHFUL = PRESETS["faithful"]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in (ENV, "SGLANG_PLUGINS", "SGLANG_PLATFORM"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(random_model.config(random_model.Shape(layers=4, index_topk=2048)))
    )
    return str(tmp_path)


@pytest.fixture
def checked(capsys):
    """(exit status, output) of a check with these words."""

    def run(*words):
        status = launch_server.main(["--check", *words])
        return status, capsys.readouterr().out

    return run


def test_phases_gates_and_memory(checked, model):
    status, out = checked("--misa-preset", "faithful", "--model-path", model)
    assert status == 0, out
    for words in (
        f"up to {FAITHFUL.prefill.min_len} tokens",
        f"fewer than {FAITHFUL.decode.min_rows} rows",
        f"fewer than {FAITHFUL.decode.min_tokens} tokens beyond {FAITHFUL.decode.min_len} for each",
        "3 of 64 heads by error, the others as one column",
        "38 B a token and layer",
        "152 B a token in 4 layers",
        "No reason against this launch was found",
    ):
        assert words in out


FOUR = {str(layer): {} for layer in range(4)}
BAD = "\x1b[2J\r\n\u202e"


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        (FOUR, "policy file by '\\x1b[2J"),
        (FOUR, "with architecture='DeepseekV32ForCausalLM', got '\\x1b[2J"),
        ({}, "got none for 0, 1, 2, 3; add or drop them"),
        ({BAD: {}, **FOUR}, "got others, \\x1b[2J"),
        ({"0": {"prefill": {BAD: 8}}}, "layers.0.prefill.\\x1b[2J"),
        ({"0": {"prefill": {"router": BAD}}}, "got '\\x1b[2J"),
    ],
)
def test_no_word_of_a_policy_file_steers_the_terminal(model, tmp_path, capsys, layers, said):
    sizes = {"layers": 4, "index_heads": 64, "index_topk": 2048, "config_sha256": "0" * 64}
    written = {"created_by": BAD, "target_recall": 0.9, "length": 8192, "layers": layers}
    path = tmp_path / "policy.json"
    path.write_text(json.dumps({"model": {"architecture": BAD, **sizes}, **written}))
    assert launch_server.main(["--check", "--misa-policy", str(path), "--model-path", model]) != 0
    told = "".join(capsys.readouterr())
    assert said in told
    assert [character for character in "\x1b\r\u202e" if character in told] == []


def test_off_is_off(checked, model):
    assert checked("--model-path", model)[1].startswith("sglang-misa is off")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--misa-preset dsa --misa-prefill-min-len 1000 --misa-prefill-tail 8", "prefill.min_len=1000, prefill.tail=8"),
        ("--misa-preset misa --misa-decode-min-rows 3", "decode.min_rows=3"),
        ("--misa-preset hisa --misa-prefill-router peak", "prefill.router=peak"),
        ("--misa-preset exact --misa-prefill-block-size 128", "prefill.block_size=128"),
        ("--misa-preset dsa --misa-audit-rows 4 --misa-verify-ranks 9", "audit.rows=4, verify_ranks=9"),
        ("--misa-preset fast --misa-verify-ranks 9", "verify_ranks=9 (one rank)"),
        ("--misa-preset fast --misa-verify-ranks 9 --tp 2", None),
        ("--misa-preset faithful --misa-decode dsa --context-length 16385", None),
        ("--misa-preset faithful --misa-decode dsa --context-length 17k", None),
        (
            "--misa-preset faithful --misa-decode dsa --context-le 16Ki",
            "prefill.min_len=16384 (no request of 16384 tokens passes it)",
        ),
        ("--misa-preset fast --misa-verify-ranks 9 --config {yaml}", None),  # it may name more ranks
        *((f"--misa-preset {name} --misa-audit-rows 4", None) for name in PRESETS if name != "dsa"),
    ],
)
def test_settings_without_effect_are_said(checked, model, tmp_path, words, said):
    (tmp_path / "more.yaml").touch()
    status, out = checked(*words.format(yaml=tmp_path / "more.yaml").split(), "--model-path", model)
    assert status == 0, out
    assert f"without effect on this selection: {said}\n" in out if said else "without effect" not in out


def test_every_reason_comes_with_exit_status_2(checked, model, monkeypatch):
    monkeypatch.setenv("SGLANG_PLUGINS", "another")
    status, out = checked(
        *("--misa-preset", "misa", "--misa-prefill-heads", "65", "--model-path", model, "--tp", "8", "--pp-size=2"),
        *("--enable-mixed-chunk", "--attention-backend", "fa3"),
        *("--misa-dump", "/"),
    )
    assert status == launch_server.REFUSED
    for words in (
        "--attention-backend: expected None or 'dsa'",
        "--enable-mixed-chunk",
        "--pp-size: expected 1, got 2",
        "prefill.heads: expected at most the model's 64",
        "--misa-dump: expected a folder of this user alone",
        "SGLANG_PLUGINS",
    ):
        assert words in out


def test_every_reason_against_a_decode_server_is_told(checked, model):
    words = "--disaggregation-mode decode --disaggregation-transfer-backend nixl --speculative-algorithm nextn"
    flags = "--enable-hierarchical-cache --disaggregation-decode-enable-radix-cache"
    later = "--disaggregation-decode-enable-offload-kvcache"
    command = ("--model-path", model, *words.split(), *flags.split(), later)
    status, out = checked("--misa-preset", "fast", *command)
    assert status == launch_server.REFUSED
    assert "--disaggregation-transfer-backend: expected mooncake with a decode policy, got nixl" in out
    assert "--speculative-algorithm: expected None, got 'NEXTN'" in out
    assert all(f"{flag}: expected False, got True" in out for flag in (*flags.split(), later))
    assert checked("--misa-preset", "fast", "--misa-decode", "dsa", *command)[0] == 0
    by_alias = ("--disaggregation-mode", "decode", "--enable-hicache")
    assert (
        "--enable-hierarchical-cache: expected False"
        in checked("--misa-preset", "fast", "--model-path", model, *by_alias)[1]
    )


def test_what_a_launch_would_refuse_for_its_words_a_check_refuses(checked, model, tmp_path):
    wanted = ("--misa-preset", "misa", "--misa-allow-unverified")
    for words, why in (
        ([], "--model-path: expected a folder or a Hugging Face name, got none"),
        (["--model-path", model, "--config", "/no/such.yaml"], "--config: expected SGLang's YAML file"),
        (["--model-path", model, "--host", "0.0.0.0"], "--host: expected a key"),
    ):
        status, out = checked(*wanted, *words)
        assert status == launch_server.REFUSED
        assert why in out
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert checked(*wanted, "--model-path", model)[0] == 0  # a config.json alone is enough
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    status, out = checked(*wanted, "--model-path", model)
    assert status == launch_server.REFUSED
    assert "without model-00002-of-00002.safetensors; finish the download" in out


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--api-key-file", "/no/such/key"], "--api-key-file: expected a readable text file"),
        (["--page-size", "x"], "--page-size: invalid int value: 'x'; see --help"),
        (["--misa-dump", "/proc/no-folder"], "--misa-dump: expected a folder that can be written"),
        (["--misa-dump", "d", "--misa-dump-gib", "inf"], "--misa-dump-gib: expected a finite number, got inf"),
        (["--tp", "0"], "--tp-size: expected 1 or more, got 0"),
        (["--misa-dump", "d", "--misa-dump-layers", ""], "--misa-dump-layers: "),
    ],
)
def test_words_that_cannot_be_used_have_a_sentence(model, capsys, words, why):
    wanted = ["--check", "--misa-preset", "misa", "--model-path", model]
    assert launch_server.main([*wanted, *words]) == launch_server.REFUSED
    told = capsys.readouterr()
    assert why in told.out + told.err


def test_flags_that_only_sglang_can_judge_are_listed(checked, model):
    words = ("--misa-preset", "misa", "--misa-allow-unverified", "--model-path", model, "--port", "1", "--tp", "2")
    assert "whether SGLang knows" not in checked(*words, "--ssl-keyfile", "key.pem")[1]  # whole, and part of another
    assert "whether SGLang knows --max-runing-requests, and" in checked(*words, "--max-runing-requests", "4")[1]


def test_a_flag_cut_short_is_judged_as_sglang_completes_it(checked, model):
    wanted = ("--misa-preset", "misa", "--misa-allow-unverified", "--model-path", model)
    for words, why in (
        (("--attention-b", "fa3"), "--attention-backend: expected None or 'dsa'"),
        (("--enable-mixed",), "--enable-mixed-chunk: expected False, got True"),
        (("--pipeline=2",), "--pp-size: expected 1, got 2"),
    ):
        status, out = checked(*wanted, *words)
        assert status == launch_server.REFUSED
        assert why in out
        assert f"whether SGLang knows {words[0].partition('=')[0]}, and" in out  # another of its flags may begin so
    assert launch_server.main(["--check", *wanted, "--attention", "fa3"]) == launch_server.REFUSED


def test_no_flag_of_sglang_is_part_of_one_that_is_judged():
    """argparse takes a whole flag before a part of one: here both are known only where this holds."""
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    judged = {flag for action in check._parser()._actions for flag in action.option_strings}
    sglangs = {flag for action in parser._actions for flag in action.option_strings}
    assert [flag for flag in sglangs - judged if any(one.startswith(flag) for one in judged)] == []
    lengths = next(action.type for action in parser._actions if action.dest == "context_length")
    for word in ("4096", " 128k", "25.6k", "1.5M", "128Ki", "2Mi"):
        assert check.token_count(word) == lengths(word)
    for word in ("x", "", "4K", "1kk"):
        with pytest.raises(ValueError, match=r"expected|Invalid"):
            check.token_count(word)


def test_a_model_elsewhere_is_said_to_be_unknown(checked):
    _, out = checked("--misa-preset", "misa", "--model-path", "owner/model")
    assert "assumed to be DeepSeek-V3.2's" in out


def test_a_laptop_needs_neither_torch_nor_sglang(model):
    code = (
        "import sys\n"
        "for name in ('torch', 'sglang', 'rich', 'numpy'): sys.modules[name] = None\n"
        "from sglang_misa import launch_server, versions\n"
        "from importlib import metadata\n"
        "def none(): raise metadata.PackageNotFoundError('sglang')\n"
        "versions.installed = none\n"
        f"sys.exit(launch_server.main(['--check', '--misa-preset', 'misa-hisa', '--model-path', {model!r}]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "SGLang's version, as none is installed" in run.stdout
    assert "the GPU, as this machine has none" in run.stdout
