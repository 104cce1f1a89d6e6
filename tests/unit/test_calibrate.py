"""A calibrated policy keeps its target on rows that did not choose it, and a server accepts the file."""

import argparse
import csv
import itertools
import json
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dripping import dripping
from dumped_files import IDENTITY, dumped
from safetensors.torch import load_file

from sglang_misa import flags, http_request
from sglang_misa.bench import inputs, selection
from sglang_misa.calibrate import __main__ as calibrate
from sglang_misa.calibrate import prompts
from sglang_misa.calibrate.costs import SHIPPED, Measured, Modelled
from sglang_misa.config import PRESETS, ConfigError, SelectionPolicy

TRAINED = Path(__file__).parents[3] / "shared/trained"
TARGET, LENGTH = 0.97, 8192
GATE = PRESETS["faithful"].decode


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Dumps of two trained layers, as layers 0 and 2 of four, over their first 32K keys."""
    folder, found = tmp_path_factory.mktemp("dump"), []
    for layer in (0, 2):
        source = TRAINED / f"layer{layer}.safetensors"
        if not source.exists():
            pytest.skip(f"needs {TRAINED}")
        found.append(dumped(folder / f"{layer}.safetensors", load_file(source), layer))
    return found


def calibrated(*words: Any) -> int:
    return calibrate.main([str(word) for word in words])


def test_the_target_is_kept_on_rows_that_were_held_out(
    trained: list[Path], tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [
        (phase, policy)
        for phase, policy in selection.policies()
        if not policy.sketch
        and (policy.block_size == 128 if phase == "decode" else (policy.columns, policy.router) == (4, "error"))
    ]
    monkeypatch.setattr(selection, "policies", lambda: few)
    out, plot = tmp_path / "policy.json", tmp_path / "policy.png"
    words = ("--target", TARGET, "--length", LENGTH, "--rows", 32, "--costs", "model", "--out", out, "--plot", plot)
    words += ("--min-len", 2048, "--min-rows", GATE.min_rows, "--min-tokens", GATE.min_tokens)
    assert calibrated(*trained, *words) == 0
    assert "layers 1,3" in capsys.readouterr().out, "layers without a dump are told"
    assert plot.stat().st_size > 1000
    parser = argparse.ArgumentParser()
    flags.add_cli_flags(parser)
    config = flags.from_flags(parser.parse_args(["--misa-policy", str(out)]))
    assert config is not None
    assert not config.policy("prefill", 1).active
    for layer in (0, 2):
        decode = config.policy("decode", layer)
        assert not decode.active or (decode.min_rows, decode.min_tokens) == (GATE.min_rows, GATE.min_tokens)
        for phase, recall in config.layers.layers[str(layer)].recall.items():
            assert recall.held_out >= TARGET - 0.01, (layer, phase)
            assert recall.cost <= 1
        assert config.layers.layers[str(layer)].recall["prefill"].cost < 0.6, "something cheaper than DSA was found"


def test_a_server_command_without_dumps_of_one_model_is_refused(tmp_path: Path, capsys) -> None:
    x = vars(inputs.make("topics", 4, 4096, 64, device="cpu")) | {"positions": torch.arange(4092, 4096).int()}
    ours = dumped(tmp_path / "a.safetensors", x, 0)
    other = dumped(tmp_path / "b.safetensors", x, 0, IDENTITY.model_copy(update={"layers": 5}))
    beyond = dumped(tmp_path / "d.safetensors", x, IDENTITY.layers)
    bare = dumped(tmp_path / "e.safetensors", {name: part for name, part in x.items() if name != "positions"}, 0)
    (tmp_path / "dump").mkdir()
    (tmp_path / "c.safetensors").write_bytes(b"no tensors")
    out = tmp_path / "out.json"
    cases = {
        f"expected layers 0 to {IDENTITY.layers - 1} of this model": (ours, beyond),
        "expected dumps of one model": (ours, other),
        "expected what --misa-dump writes": (tmp_path / "c.safetensors",),
        "expected files, or --server with its --dump": (),
        "or 3072, as windows start at multiples of 1024, got 2048": (ours, "--length", 2048),
        "or 3072, as windows start at multiples of 1024, got 3071": (ours, "--length", 3071),
        "--length: expected at most 4096, the longest file's keys, got 4097": (ours, "--length", 4097),
        "--costs: expected a CSV of bench.kernels": (ours, "--costs", tmp_path / "none.csv"),
        "none.csv": ("--server", "http://127.0.0.1:1", "--dump", tmp_path, "--costs", tmp_path / "none.csv"),
        "--costs: expected measurements with 64 index heads": (ours, "--costs", "/dev/null"),
        "expected each file once": (ours, tmp_path / "dump" / ".." / "a.safetensors"),
        "e.safetensors: expected positions of the rows": (bare,),
        "--min-len: expected a number less": (ours, "--min-len", 1 << 31),
        "--server: expected SGLang at": ("--server", "http://127.0.0.1:1", "--dump", tmp_path, "--count", 1),
        "--target: expected more than 0": (ours, "--target", 2),
    }
    for said, words in cases.items():
        assert calibrated("--target", 0.9, "--out", out, *words) == calibrate.REFUSED
        assert said in capsys.readouterr().err
    out.write_text("{}")
    assert calibrated(ours, "--target", 0.9, "--out", out) == calibrate.REFUSED
    assert out.read_text() == "{}"


def test_a_server_that_stops_dumping_before_the_answers_is_refused(tmp_path: Path, capsys, monkeypatch) -> None:
    x = vars(inputs.make("topics", 4, 4096, 64, device="cpu")) | {"positions": torch.arange(4092, 4096).int()}
    folder = tmp_path / "dump"
    folder.mkdir()

    def ask(url: str, number: int, *_: object) -> prompts.Answer:
        if not list(folder.iterdir()):  # as at its --misa-dump-gib: nothing after the first prompt
            dumped(folder / "prompt.safetensors", x, 0)
        return prompts.Answer("said", 4096)

    monkeypatch.setattr(prompts, "ask", ask)
    words = ("--server", "http://127.0.0.1:1", "--dump", folder, "--count", 1, "--length", 4096, "--target", 0.9)
    assert calibrated(*words, "--out", tmp_path / "out.json") == calibrate.REFUSED
    assert "of prompts and of answers" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_what_others_ask_a_server_meanwhile_is_neither_a_prompt_nor_an_answer(
    tmp_path: Path, capsys, monkeypatch
) -> None:
    x = vars(inputs.make("topics", 2, 4096, 64, device="cpu")) | {"positions": torch.tensor([4000, 4095]).int()}
    sent: list[str] = []

    def tensors(keys: int, rows: int = 2) -> dict[str, torch.Tensor]:
        cut = {"index_k": keys, "k_scale": keys} | dict.fromkeys(("index_q", "head_gates", "positions"), rows)
        shorter = {name: part[: cut[name]].clone() for name, part in x.items()}
        return shorter | {"positions": torch.tensor([keys - 1] * rows).int()}

    def ask(url: str, number: int, text: str, *_: object) -> prompts.Answer:
        sent.append(text)
        keys = 3000 + len(sent)
        dumped(tmp_path / f"{len(sent)}-own.safetensors", tensors(keys, rows=len(sent)), 0)
        dumped(tmp_path / f"{len(sent)}-other.safetensors", tensors(4096), 0)
        return prompts.Answer(" said", keys)

    monkeypatch.setattr(prompts, "ask", ask)
    words = ("--server", "http://127.0.0.1:1", "--dump", tmp_path, "--count", 1, "--target", 0.9)
    given = calibrate._parser().parse_args([str(word) for word in (*words, "--out", tmp_path / "out.json")])
    found = calibrate._dumped(given)
    assert [(each.path.name, each.answer) for each in found] == [
        ("1-own.safetensors", None),
        ("2-own.safetensors", 3001),
    ]
    assert sent[1] == sent[0] + " said"
    told = (
        "prompt 0: 3001 tokens, 1 and 2 rows: most of it was in the server's cache, which POST /flush_cache empties\n"
    )
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("tokens", [7, 4097])
def test_a_count_that_is_not_the_dumps_is_refused(tokens: int, tmp_path: Path, capsys, monkeypatch) -> None:
    x = vars(inputs.make("topics", 4, 4096, 64, device="cpu")) | {"positions": torch.arange(4092, 4096).int()}

    def ask(url: str, number: int, *_: object) -> prompts.Answer:
        dumped(tmp_path / "prompt.safetensors", x, 0)
        return prompts.Answer("said", tokens)

    monkeypatch.setattr(prompts, "ask", ask)
    words = ("--server", "http://127.0.0.1:1", "--dump", tmp_path, "--count", 1, "--length", 4096, "--target", 0.9)
    assert calibrated(*words, "--out", tmp_path / "out.json") == calibrate.REFUSED
    assert f"prompt 0 to be the keys dumped of it, 4096, got {tokens}" in capsys.readouterr().err


@pytest.mark.parametrize(("first", "asked"), [(0, [0]), (1, [0, 0, 1])], ids=["dumped", "too short to be dumped"])
def test_a_length_is_judged_by_the_first_prompt_that_is_dumped(
    first: int, asked: list[int], tmp_path: Path, capsys, monkeypatch
) -> None:
    x = vars(inputs.make("topics", 4, 4096, 64, device="cpu")) | {"positions": torch.arange(4092, 4096).int()}
    sent = []

    def ask(url: str, number: int, *_: object) -> prompts.Answer:
        sent.append(number)
        if number >= first:
            dumped(tmp_path / f"{len(sent)}.safetensors", x, 0)
        return prompts.Answer("said", 4096)

    monkeypatch.setattr(prompts, "ask", ask)
    words = ("--server", "http://127.0.0.1:1", "--dump", tmp_path, "--count", 3, "--length", 2100, "--target", 0.9)
    assert calibrated(*words, "--out", tmp_path / "out.json") == calibrate.REFUSED
    assert "--length: expected all keys of" in capsys.readouterr().err
    assert sent == asked


def test_an_interruption_is_one_line(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "sglang_misa.calibrate", "--dump", tmp_path, "--target", "0.9", "--count", "1"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        words += ["--server", url, "--out", tmp_path / "out.json"]
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what a script runs in the background ignores it
        with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, preexec_fn=heard) as process:
            peer, _ = server.accept()  # and nothing is answered
            process.send_signal(signal.SIGINT)
            try:
                _, told = process.communicate(timeout=60)
            finally:
                process.kill()
                peer.close()
    assert process.returncode == calibrate.INTERRUPTED
    assert told == f"interrupted: {tmp_path}/out.json was not written, and the same command begins anew\n"


def test_a_picture_that_cannot_be_drawn_is_refused(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        calibrated("x", "--target", 0.9, "--out", tmp_path / "out.json", "--plot", tmp_path / "x.txt")
    assert "--plot: expected a file that ends in" in capsys.readouterr().err


def test_a_policy_tells_the_length_that_prompts_hold(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(selection, "policies", lambda: [("prefill", SelectionPolicy(heads=8, router="peak"))])
    positions = torch.arange(4000, 4096).int()
    x = vars(inputs.make("topics", len(positions), 4096, 64, device="cpu")) | {"positions": positions}
    path, out = dumped(tmp_path / "a.safetensors", x, 0), tmp_path / "out.json"
    assert calibrated(path, "--target", 0.9, "--rows", 4, "--min-len", 2048, "--costs", "model", "--out", out) == 0
    assert json.loads(out.read_text())["length"] == 4096


def test_a_measured_cost_is_that_of_the_table() -> None:
    costs = Measured.read(SHIPPED, 64, 131072, 64)
    with SHIPPED.open() as file:
        rows = [row for row in csv.DictReader(file) if row["preset"] == "fast" and row["index_heads"] == "64"]
    ratios = [
        float(row["ratio"])
        for row in rows
        if (row["rows"], row["length"]) == ("8192", "131072") and not row["inputs"].startswith("hostile")
    ]
    assert costs.of("prefill", PRESETS["fast"].prefill) == pytest.approx(1 / min(ratios))
    assert costs.of("prefill", SelectionPolicy()) == 1.0
    assert costs.of("prefill", SelectionPolicy(heads=16)) is None, "never measured"
    assert "model" in Modelled(64, LENGTH).source
    assert Modelled(64, LENGTH).of("prefill", SelectionPolicy(heads=8)) < Modelled(64, LENGTH).of(
        "prefill", SelectionPolicy(heads=16)
    )


def test_costs_of_a_phase_are_of_one_length() -> None:
    """Shipped: HISA in decode and eight heads in prefill were not measured where the sketches and three heads were."""
    cases = {8192: (8192, 32768), 65536: (32768, 65536), 131072: (131072, 131072), 1 << 20: (131072, 262144)}
    for length, told in cases.items():
        costs = Measured.read(SHIPPED, 64, length, 64)
        assert costs.source == f"measured on NVIDIA H200, prefill at {told[0]} keys, decode at {told[1]} keys"
        assert (costs.of("decode", PRESETS["hisa"].decode) is None) == (told[1] != 131072)
        assert (costs.of("prefill", PRESETS["misa-hier"].prefill) is None) == (told[0] == 8192)
        assert costs.of("decode", PRESETS["faithful"].decode) < 1
    with pytest.raises(ConfigError, match=r"--batch: expected requests of a decode step that .*, 1, 4, .*, got 17"):
        Measured.read(SHIPPED, 64, LENGTH, 17)


def test_an_error_whose_answer_has_no_end_is_told_all_the_same(monkeypatch) -> None:
    monkeypatch.setattr(http_request, "SAID_S", 0.3)
    said = b"HTTP/1.1 500 Out of luck\r\nContent-Length: 999\r\n\r\n"
    told = "expected an answer to prompt 3, got 500: Out of luck; check the address, and the server's log"
    with dripping(said) as url, pytest.raises(ConfigError, match=told):
        prompts.ask(url, 3, "text", 8, None)


@pytest.mark.parametrize(
    ("code", "way_out"), [(400, "shorten it"), (401, "add --key-file"), (413, "shorten it"), (501, "check the address")]
)
def test_the_advice_is_by_the_servers_status(code: int, way_out: str) -> None:
    said = f"HTTP/1.1 {code} No\r\nContent-Length: 2\r\n\r\nno".encode()
    with dripping(said) as url, pytest.raises(ConfigError, match=f"got {code}: \\S+; {way_out}"):
        prompts.ask(url, 0, "text", 8, None)


def test_a_busy_server_is_asked_again_a_few_times(monkeypatch) -> None:
    paused: list[float] = []
    monkeypatch.setattr(http_request, "time", SimpleNamespace(sleep=paused.append))
    for more, pause in (("", http_request.PAUSE_S), ("Retry-After: 9\r\n", 9), ("Retry-After: 9999\r\n", 60)):
        said = f"HTTP/1.1 503 No\r\n{more}Content-Length: 2\r\n\r\nno".encode()
        with dripping(said) as url, pytest.raises(ConfigError, match=r"got 503: no; it was asked 5 times: repeat"):
            prompts.ask(url, 0, "text", 8, None)
        assert paused == [pause] * (http_request.TRIES - 1)
        paused.clear()


@pytest.mark.parametrize(
    "answer",
    [
        "<html>",
        "[1]",
        '{"text": 5, "meta_info": {"prompt_tokens": 7}}',
        '{"text": "", "meta_info": {"prompt_tokens": "x"}}',
        '{"text": "", "meta_info": {"prompt_tokens": -7}}',
        "[" * 100_000,
    ],
)
def test_an_answer_of_another_kind_is_refused(answer: str) -> None:
    said = f"HTTP/1.1 200 OK\r\nContent-Length: {len(answer)}\r\n\r\n{answer}".encode()
    with dripping(said) as url, pytest.raises(ConfigError, match="expected SGLang's /generate"):
        prompts.ask(url, 0, "text", 8, None)


def test_prompts_are_texts_of_different_order_or_the_users(tmp_path: Path) -> None:
    for tokens in (5000, 131072):
        texts = [*prompts.built_in(4, tokens)]
        assert [len(text) for text in texts] == [prompts.CHARACTERS * tokens] * 4
        ends = [{line for line in text[-prompts.CHARACTERS * 8192 :].splitlines() if len(line) > 60} for text in texts]
        for one, other in itertools.combinations(ends, 2):
            assert len(one & other) < 0.05 * len(one), "what is held out is other text"
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({name: name}) for name in ("prompt", "text")))
    assert prompts.read([tmp_path / "a.txt", tmp_path / "b.jsonl"]) == ["one", "prompt", "text"]
    (tmp_path / "e.jsonl").write_text('{"prompt": "a\u2028b\x85c"}\n{"prompt": "d"}')
    assert prompts.read([tmp_path / "e.jsonl"]) == ["a\u2028b\x85c", "d"]
    (tmp_path / "c.jsonl").write_text('{"question": 1}')
    (tmp_path / "f.jsonl").write_text("[" * 100_000)
    (tmp_path / "d.txt").write_text(" ")
    for name, told in (
        ("c.jsonl", r"\S+:1: expected a text"),
        ("d.txt", "expected texts, got nothing"),
        ("f.jsonl", r"\S+:1: expected one JSON object"),
        ("none.txt", r"\S+: expected a readable UTF-8 file"),
    ):
        with pytest.raises(ConfigError, match=f"--prompts: {told}"):
            prompts.read([tmp_path / name])
