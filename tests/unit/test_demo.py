"""What the demo asks of its servers: presets for its model, its model itself, or a sentence."""

import io
import json

import pytest
from rich.console import Console

from sglang_misa import demo, launch_server
from sglang_misa.bench.quality.page import Section
from sglang_misa.config import PHASES, PRESETS, Audit, MisaConfig
from sglang_misa.procs import free_port

SIZES = json.loads((demo.MODEL / "config.json").read_text())


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_select_on_the_model(name):
    for phase in PHASES:
        policy = PRESETS[name].policy(phase)
        scaled = demo.scaled(policy)
        assert list(scaled.problems(phase, index_heads=SIZES["index_n_heads"], topk=SIZES["index_topk"])) == []
        assert scaled.name == policy.name
        assert not scaled.active or scaled.min_len == demo.TOPK
        assert (scaled.min_rows, scaled.min_tokens) == (1, 0)


def test_a_scaled_preset_keeps_as_much_of_the_top_k():
    assert SIZES["index_topk"] == demo.TOPK
    assert demo.scaled(PRESETS["faithful"].prefill).candidates == 1.5 * demo.TOPK
    hisa = demo.scaled(PRESETS["hisa"].decode)
    assert hisa.blocks * hisa.block_size == 4 * demo.TOPK


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--demo-report", "{file}/report"], "--demo-report: expected a folder to write to"),
        (["--demo-report", "/proc/self"], "--demo-report: expected a folder to write to, got /proc/self"),
        (["--demo-report="], "--demo-report: expected a path, got an empty name"),
        (["--misa-preset", "dsa"], "expected a preset to compare with stock DSA"),
        (["--device", "cuda"], "--device: expected cpu or none, as --demo serves there, got cuda"),
    ],
)
def test_a_demo_that_would_show_nothing_is_refused(capsys, tmp_path, words, expected):
    (tmp_path / "file").touch()
    words = [word.format(file=tmp_path / "file") for word in words]
    assert launch_server.main(["--demo", "--port", str(free_port()), *words]) == launch_server.REFUSED
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(("preset", "phases"), [("fast", "In decode,"), ("faithful", "In decode,"), ("misa", None)])
def test_a_recall_that_says_nothing_is_told(preset, phases):
    console = Console(record=True, width=1000, file=io.StringIO())
    demo._print(console, demo.served(PRESETS[preset]), [Section("needles", "found", ())], {"sglang": "1"})
    told = [line for line in console.export_text().splitlines() if "tokens of a prompt are candidates" in line]
    assert [line.startswith(phases) for line in told] == [True] * (phases is not None)


def test_an_audit_that_is_asked_for_is_the_one():
    mine = Audit(rows=2, every=3, floor=0.5)
    assert demo.served(MisaConfig(audit=mine)).audit == mine
    assert demo.served(MisaConfig()).audit == demo.AUDIT


def test_the_address_of_every_host():
    hosts = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]", "localhost": "localhost", "10.0.0.1": "10.0.0.1"}
    assert {host: demo._url(host, 1) for host in hosts} == {host: f"http://{at}:1" for host, at in hosts.items()}
