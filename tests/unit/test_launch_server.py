"""What the launcher refuses by itself, what it reads from SGLang's words, and that it stays light until then."""

import json
import os
import socket
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest

from sglang_misa import __version__, launch_server, random_model, versions
from sglang_misa.config import ENV, PRESETS, ConfigError

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in (ENV, "SGLANG_PLUGINS", "SGLANG_PLATFORM", "SGLANG_MISA_CPU"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture
def folder(tmp_path):
    """Writes config.json and returns its folder."""

    def write(config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return write


@pytest.fixture
def refused(port, capsys):
    """The message of a launch that must be refused."""

    def run(*words):
        with_port = words if "--port" in words else (*words, "--port", port)
        assert launch_server.main(with_port) == launch_server.REFUSED
        return capsys.readouterr().err

    return run


def test_help_needs_neither_torch_nor_sglang():
    code = (
        "import sys; from sglang_misa import launch_server as l\n"
        "try: l.main(['--help'])\n"
        "except SystemExit as end: print(end.code, [m for m in ('torch', 'sglang', 'rich') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.splitlines()[-1] == "0 []", run.stderr
    assert "--misa-preset" in run.stdout
    assert "Every other flag is SGLang's" in run.stdout


def test_help_in_a_terminal_of_ascii_alone():
    command = [sys.executable, "-m", "sglang_misa.launch_server", "--help"]
    environ = os.environ | {"PYTHONIOENCODING": "ascii"}
    run = subprocess.run(command, capture_output=True, text=True, env=environ, check=True)
    assert "--demo-report" in run.stdout


@pytest.mark.parametrize("found", [True, False])
def test_the_versions(monkeypatch, capsys, found):
    if not found:
        monkeypatch.setattr(versions, "installed", lambda: metadata.version("no-such-package"))
    with pytest.raises(SystemExit) as ended:
        launch_server.main(["--version"])
    sglang = f"with SGLang {versions.installed()}" if found else "without SGLang"
    assert (ended.value.code, capsys.readouterr().out) == (0, f"sglang-misa {__version__} {sglang}\n")


def test_a_misspelt_flag(refused):
    assert "did you mean --misa-prefill-heads?" in refused("--misa-prefill-head", "8")


def test_impossible_settings(refused):
    message = refused("--misa-prefill-heads", "many", "--misa-prefill-block-size", "x")
    assert "--misa-prefill-heads: expected a whole number or 'all', got 'many'" in message
    assert "--misa-prefill-block-size" in message


def test_more_heads_than_the_model_has(refused, folder):
    model = folder(random_model.config(random_model.CPU))
    message = refused("--misa-preset", "misa", "--misa-prefill-heads", "65", "--model-path", model)
    assert "expected at most the model's 64 index heads, got 65" in message


def test_the_override_of_the_model_is_read(refused, folder):
    model = folder(random_model.config(random_model.CPU))
    override = json.dumps({"index_n_heads": 4})
    message = refused("--misa-preset=misa", f"--model={model}", "--json-model-override-args", override)
    assert "expected at most the model's 4 index heads, got 8" in message


def test_a_model_without_sparse_attention(refused, folder):
    message = refused("--misa-preset", "misa", "--model-path", folder(LLAMA))
    assert "got LlamaForCausalLM with index_topk=None; serve it without --misa-* flags" in message


def test_the_variable_is_checked_like_flags(refused, folder, monkeypatch):
    monkeypatch.setenv(ENV, "misa")
    assert "got LlamaForCausalLM" in refused("--model-path", folder(LLAMA))


def test_a_missing_folder_and_one_without_a_model(refused, tmp_path):
    for nowhere in ("/no/such/folder", "~no-such-user/a/model", "n" * 5000):
        assert f"got {nowhere}" in refused("--model-path", nowhere)
    assert "expected a folder with config.json" in refused("--model-path", str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", '"text"', "[" * 100_000])
def test_a_broken_config(refused, tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert "config.json: expected one JSON object, got" in refused("--model-path", str(tmp_path))


def test_a_broken_override_of_the_model(refused, folder):
    model = folder(random_model.config(random_model.CPU))
    message = refused("--model-path", model, "--json-model-override-args", "{")
    assert "--json-model-override-args: expected one JSON object, got '{'" in message


@pytest.mark.parametrize(
    "wrong",
    [
        *({"index_topk": "64"}, {"architectures": "LlamaForCausalLM"}, {"index_n_heads": 6.5}),
        *({"index_topk": True}, {"num_hidden_layers": "many"}, {"architectures": [None]}),
        *({"index_topk": 0}, {"index_n_heads": -64}, {"num_hidden_layers": 0}),
    ],
)
def test_a_config_of_other_types(refused, folder, wrong):
    model = folder({**random_model.config(random_model.CPU), **wrong})
    (name,) = wrong
    assert f"expected {name} to be" in refused("--misa-preset", "misa", "--device", "cpu", "--model-path", model)


def test_a_model_without_weights(refused, folder, tmp_path):
    model = folder(random_model.config(random_model.CPU))
    wanted = ("--misa-preset", "misa", "--device", "cpu", "--model-path")
    assert f"expected weights (*.safetensors, *.bin, *.pt, *.gguf) in {model}, got none" in refused(*wanted, model)
    assert "expected a folder with config.json" in refused(*wanted, str(tmp_path / "config.json"))
    (tmp_path / "model.safetensors").touch()
    for index in ("[]", '{"weight_map": {"a": 1, "b": "c.safetensors"}}'):
        (tmp_path / "model.safetensors.index.json").write_text(index)
        assert "expected an index of weights" in refused(*wanted, model)


def test_a_key_given_twice_or_beside_none(refused, tmp_path):
    (tmp_path / "key").write_text("secret")
    for words, said in (
        (("--api-key-file", tmp_path / "key", "--api-key=other"), "--api-key-file: expected no --api-key beside it"),
        (("--admin-api-key-file", tmp_path / "key", "--admin-api-key", "other"), "expected no --admin-api-key beside"),
        (("--no-api-key", "--api-key", "other"), "--no-api-key: expected no key beside it"),
        (("--no-api-key", "--api-key-file", tmp_path / "key"), "--no-api-key: expected no key beside it"),
    ):
        message = refused(*map(str, words))
        assert said in message
        assert "other" not in message


def test_no_model(refused):
    assert "--model-path: expected a folder or a Hugging Face name, got none" in refused("--misa-preset", "misa")
    assert "--model-path" in refused()


def test_flags_that_keep_sglang_from_asking_the_indexer(refused, folder):
    model = folder(random_model.config(random_model.CPU))
    message = refused("--misa-preset", "misa", "--device", "cpu", "--model-path", model, "--enable-mixed-chunk")
    assert "--enable-mixed-chunk: expected False, got True" in message


def test_no_sglang(refused, monkeypatch):
    monkeypatch.setattr(launch_server.importlib.util, "find_spec", lambda name: None)
    assert "got none; install sglang-misa[sglang]" in refused("--model-path", "owner/model")


def test_an_unknown_sglang(refused, monkeypatch):
    monkeypatch.setattr(launch_server.versions, "installed", lambda: "0.5.99")
    assert "got 0.5.99; install" in refused("--misa-preset", "misa", "--model-path", "owner/model")


def test_no_gpu_and_no_word_for_the_cpu(refused, monkeypatch):
    monkeypatch.setattr(launch_server, "GPU_DEVICES", ("/dev/no-such-device",))
    assert "add --device cpu" in refused("--misa-preset", "misa", "--model-path", "owner/model")


def test_the_variable_beside_flags(refused, monkeypatch):
    monkeypatch.setenv(ENV, "hisa")
    assert f"{ENV}: expected none beside --misa-* flags, got 'hisa'" in refused("--misa-audit-rows", "4")


def test_an_empty_word_is_told(refused):
    assert "--model-path: expected a path, got an empty name (an unset variable?)" in refused("--model-path=")
    assert "--host: expected an address, got an empty one" in refused("--host=", "--api-key", "secret")
    message = refused("--config", __file__, "--admin-api-key", "--enable-metrics")
    assert message.splitlines()[1:] == ["  - --admin-api-key: expected one argument; see --help"]


def test_the_override_of_a_model_by_name_is_read_too(refused):
    message = refused("--model-path", "owner/model", "--json-model-override-args", "{")
    assert "--json-model-override-args: expected one JSON object, got '{'" in message


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user that may not read a folder")
def test_a_config_of_sglang_in_a_folder_of_another_user(tmp_path):
    """Which Python tells by an error where the folder may not even be searched."""
    tmp_path.chmod(0o700)
    code = (
        "import os, sys; from sglang_misa import launch_server\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        f"sys.exit(launch_server.main(['--config', '{tmp_path}/sglang.yaml']))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == launch_server.REFUSED
    assert f"--config: expected SGLang's YAML file, got {tmp_path}/sglang.yaml" in run.stderr


def test_a_file_in_another_encoding(refused, tmp_path):
    file = tmp_path / "misa.json"
    file.write_text("{}", encoding="utf-16")
    assert "--misa-config: expected a readable JSON file" in refused("--misa-config", str(file))
    file.write_text("[" * 100_000)
    assert "expected one JSON object" in refused("--misa-config", str(file))


FILES = ("--misa-policy", "--misa-config", "--api-key-file", "--admin-api-key-file")


@pytest.mark.parametrize("flag", FILES)
def test_an_empty_name_and_the_home_of_a_user(refused, tmp_path, monkeypatch, flag):
    assert f"{flag}: expected a path, got an empty name (an unset variable?)" in refused(f"{flag}=")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").write_text("[1]\n2")
    read = "key in ~/file, got 2 words" if flag.endswith("key-file") else "~/file: expected one JSON object"
    assert read in refused(f"{flag}=~/file", "--model-path", "owner/model")
    assert "got ~no-such-user/file" in refused(f"{flag}=~no-such-user/file", "--model-path", "owner/model")


def test_a_file_under_the_flag_of_another_kind(refused, tmp_path, monkeypatch):
    policy, config = tmp_path / "policy.json", tmp_path / "config.json"
    policy.write_text('{"model": {}, "created_by": "a test", "target_recall": 0.9, "length": 8192, "layers": {}}')
    config.write_text(PRESETS["misa"].to_json())
    for flag, file, said in (
        ("--misa-config", policy, "expected a configuration, got a policy file; give it with --misa-policy"),
        ("--misa-policy", config, "expected a policy file, got a configuration; give it with --misa-config"),
    ):
        message = refused(flag, str(file))
        assert f"{file}: {said}" in message
        assert len(message.splitlines()) == 2
    monkeypatch.setenv(ENV, policy.read_text())
    assert f"{ENV}: expected a configuration, got a policy file" in refused("--model-path", "owner/model")


def test_a_port_in_use(refused):
    with socket.socket() as user:
        user.bind(("127.0.0.1", 0))
        user.listen()
        taken = str(user.getsockname()[1])
        assert f"expected a free one on 127.0.0.1, got {taken}" in refused("--port", taken)
        assert f"got {taken}" in refused("--demo", "--port", taken)
    for wrong in ("70000", "0", "-1"):
        assert f"--port: expected a number from 1 to 65535, got {wrong}" in refused(f"--port={wrong}", "--port", wrong)
    assert "invalid int value: 'x'" in refused("--port", "x")


@pytest.mark.parametrize(("name", "value"), [("SGLANG_PLUGINS", "other, another"), ("SGLANG_PLATFORM", "other")])
def test_an_environment_that_leaves_the_plugin_out(refused, folder, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert f"{name}: expected" in refused("--misa-preset", "misa", "--model-path", "owner/model")
    assert name not in refused("--model-path", "/no/such/folder")  # stock may


def test_what_lets_the_plugin_in_passes():
    assert list(launch_server._environment_problems({"SGLANG_PLUGINS": "other, misa"})) == []
    assert list(launch_server._environment_problems({"SGLANG_PLATFORM": "misa_cpu"})) == []


@pytest.mark.parametrize("path", ["owner/model", "s3://bucket/model"])
def test_what_may_be_a_remote_model_is_left_to_sglang(path):
    assert launch_server._model_config(launch_server._peek(["--model-path", path])) is None


def test_keys_come_from_files(tmp_path):
    file = tmp_path / "key"
    file.write_text("secret\n")
    ours, rest = launch_server._parser().parse_known_args(["--admin-api-key-file", str(file), "--tp", "8"])
    assert launch_server._keys(ours) == {"--admin-api-key": "secret"}
    assert rest == ["--tp", "8"]
    file.write_text("\ufeffsecret")  # a byte-order mark is no part of the key
    assert launch_server._keys(ours) == {"--admin-api-key": "secret"}
    file.write_text("two words")
    with pytest.raises(ConfigError, match="expected one key"):
        launch_server._keys(ours)
    file.unlink()
    with pytest.raises(ConfigError, match="expected a readable text file"):
        launch_server._keys(ours)


def test_the_demo_brings_its_model(refused):
    assert "--demo brings its model" in refused("--demo", "--model-path", "owner/model")


def test_a_report_of_no_demo(refused):
    assert "--demo-report: expected --demo with it" in refused("--demo-report", "report", "--model-path", "owner/model")


def test_a_word_that_argparse_refuses_is_one_sentence(refused):
    message = refused("--misa-preset", "fst")
    assert "--misa-preset: invalid choice: 'fst'" in message
    assert len(message.splitlines()) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user that may not read a file")
def test_a_key_that_only_another_user_reads(tmp_path):
    file = tmp_path / "key"
    file.touch(mode=0o600)
    code = (
        "import os; from sglang_misa import key_mask\n"
        "os.setgroups([4711]); os.setgid(10001); os.setuid(10001)\n"
        f"key_mask.read('--api-key-file', '{file}')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "expected a file that uid 10001 can read" in run.stderr
    assert "mode 0640 and one of the groups 4711, 10001" in run.stderr


@pytest.mark.parametrize("words", [(), ("--demo",), ("--api-key=",), ("--admin-api-key", "secret")])
@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_machines_are_served_with_a_key(refused, words, host):
    assert f"expected a key, or a loopback address, got {host} without one" in refused(*words, "--host", host)


def test_a_server_without_a_key_is_asked_for_by_name():
    assert not [*launch_server._host_problems("0.0.0.0", "secret")]
    for allowed, problems in ((True, 0), (False, 1)):
        resolved = SimpleNamespace(host="0.0.0.0", api_key=None)
        assert len([*launch_server._resolved_problems(resolved, allowed)]) == problems
    assert launch_server._is_loopback("127.0.0.2")
    assert launch_server._is_loopback("::1")
    assert not launch_server._is_loopback("some.name")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--ssl-keyfile-pass secret", "got a part of --ssl-keyfile-password; write it out"),
        ("--hos 0.0.0.0", "--hos: expected a whole flag, as it is read here too, got a part of --host"),
        ("--api-ke=secret", "got a part of --api-key"),
        ("--mod x", "got a part of --model or --model-path"),
        ("--config=x.yaml", "write --config FILE"),
    ],
)
def test_words_that_sglang_would_read_otherwise_are_refused(refused, words, said):
    assert said in refused(*words.split())


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1", "2001:db8::1", "two..dots", "n" * 300])
def test_a_host_that_is_none_of_this_machine(refused, host):
    message = refused("--no-api-key", "--host", host)
    assert f"--host: expected an address or a name of this machine, got {host} (" in message
    assert "--port" not in message


def test_a_refusal_leaves_the_environment_alone(refused):
    refused("--misa-preset", "misa", "--model-path", "/no/such/folder")
    assert ENV not in os.environ
