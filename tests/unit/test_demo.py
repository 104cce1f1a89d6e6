"""What the demo does before its server starts: a whole model, or a sentence."""

import errno

import pytest

from sglang_misa import demo, demo_model, launch_server

SHAPE = demo_model.Shape(hidden=64, layers=1, q_rank=64, intermediate=64, experts=2)


@pytest.fixture
def model(tmp_path):
    return demo_model.ensure(tmp_path, SHAPE)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_whole_model_is_kept(model, monkeypatch):
    monkeypatch.setattr(demo_model, "write", None)
    assert demo_model.ensure(model.parent, SHAPE) == model


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["cut", "foreign", "gone"])
def test_a_damaged_one_is_written_anew(model, name, damage):
    before, file = contents(model), model / name
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(before[name][:-1] if damage == "cut" else before[name][:-1] + b" ")
    assert contents(demo_model.ensure(model.parent, SHAPE)) == before


def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(demo_model, "save_file", full)
    with pytest.raises(demo_model.ConfigError, match=r"expected room for \d+ MiB in .*No space left"):
        demo_model.ensure(tmp_path, SHAPE)
    assert list(tmp_path.iterdir()) == []


def test_gates_that_no_prompt_passes_and_a_report_that_cannot_be_written(capsys, tmp_path):
    words = ["--demo", "--misa-preset", "misa-hisa", "--demo-report", str(tmp_path / "no" / "report.json")]
    assert launch_server.main([*words, "--port", "0"]) == launch_server.REFUSED
    message = capsys.readouterr().err
    for expected in ("prefill.min_len: expected less than the", "decode.min_len", "--demo-report: expected a file"):
        assert expected in message


def test_the_address_of_every_host():
    hosts = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]", "localhost": "localhost", "10.0.0.1": "10.0.0.1"}
    assert {host: demo._url(host, 1) for host in hosts} == {host: f"http://{at}:1" for host, at in hosts.items()}
