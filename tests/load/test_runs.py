"""Whole runs through the command line against mock servers: what comes out on disk is what is checked."""

from __future__ import annotations

import csv
import html
import json
import os
import re
import shlex
import socket
import sys
import time
from urllib.parse import urlsplit

import pytest
from load.helpers import MOCK, PATIENT, SMALL, figures, results, units

from sglang_misa.bench.load import cli
from sglang_misa.bench.load.cli import main
from sglang_misa.bench.load.safety import Keys
from sglang_misa.bench.load.settings import LoadError
from sglang_misa.bench.load.shell import GATE_FAILED, INVALID, OK, USAGE
from sglang_misa.bench.load.store import Store
from sglang_misa.bench.quality.cli import main as quality


def test_ab_finds_an_injected_delay_and_its_size(mocks, pictures, tmp_path, capsys):
    """B waits 25 ms more before the first of its tokens, of 50: a ratio near 1.5, certain, in every artefact."""
    a, b = mocks
    a.script(ttft=0.05, itl=0.004)
    b.script(ttft=0.075, itl=0.004)
    servers = ["--a", a.url, "--b", b.url, "--names", "stock", "slow"]
    grid = ["--contexts", "1k", "2k", "--concurrencies", "1", "2", "--blocks", "5", "--requests", "2"]
    grid += ["--shared-prefix", "50"]
    gates = ["--fail-if", "ttft_p50 > 1.2", "tpot_p50 > 1.5", "error_rate > 0"]
    for attempt in "abc":
        folder = tmp_path / attempt
        code = main(["ab", *servers, *SMALL, *grid, *gates, "--out", str(folder)])
        waits = [float(row["ttft"]) for row in csv.DictReader((folder / "requests.csv").open())]
        if max(waits) < 0.15:
            break  # otherwise this machine stood still for a while
    assert code == GATE_FAILED
    assert [u["arm"] for u in units(folder)] == [*["stock", "slow", "slow", "stock"] * 2, "stock", "slow"] * 4
    result = results(folder)
    for cell in result["ratios"]:
        by_metric = {r["metric"]: r for r in cell["ratios"]}
        ttft = by_metric["ttft_p50"]
        overhead = min(f["figures"]["ttft_p50"] for f in result["arms"] if f["arm"] == "stock") - 0.05
        assert ttft["value"] == pytest.approx((0.075 + overhead) / (0.05 + overhead), rel=0.25)
        assert ttft["pairs"] == 10
        assert by_metric["tpot_p50"]["value"] == pytest.approx(1.0, abs=0.25)
    assert {g["gate"] for g in result["gates"] if g["failed"]} == {"ttft_p50 > 1.2"}
    assert result["verdict"].startswith("slow is slower than stock, 0.")
    assert result["mean"]["low"] > 1
    assert result["tone"] == "bad"
    page = (folder / "report.html").read_text()
    assert result["verdict"].split(":")[0] in page
    assert page.count("<svg") == len(list((folder / "plots").glob("*.png"))) == 6
    assert not re.search(r'(src|href)="http', page)
    assert len(list(csv.DictReader((folder / "results.csv").open()))) == 40
    assert len(waits) == 80
    assert result["verdict"][:40] in capsys.readouterr().out.replace("\n", " ")


def test_blocks_go_on_until_the_interval_is_narrow(mocks, tmp_path):
    for mock in mocks:
        mock.script(ttft=0.05)
    servers = ["--a", mocks[0].url, "--b", mocks[1].url, "--blocks", "1"]
    until = ["--until-ci", "0.5", "--max-blocks", "12"]
    assert main(["ab", *servers, *until, *SMALL, "--requests", "2", "--out", str(tmp_path)]) == OK
    assert 8 <= results(tmp_path)["ratios"][0]["ratios"][0]["blocks"] < 12
    assert main(["run", mocks[0].url, *SMALL, "--until-ci", "1e-9", "--max-blocks", "9", "--out", str(tmp_path)]) == OK
    assert len([u for u in units(tmp_path) if u["arm"] == "server"]) == 9
    seen = results(tmp_path)["arms"][0]
    assert seen["intervals"]["ttft_p50"][0] < seen["figures"]["ttft_p50"] < seen["intervals"]["ttft_p50"][1]


def test_equal_servers_show_no_gain(mocks, tmp_path):
    for mock in mocks:
        mock.script(ttft=0.03)
    servers = ["--a", mocks[0].url, "--b", mocks[1].url]
    assert (
        main(["ab", *servers, "--blocks", "3", *SMALL, "--out", str(tmp_path), "--fail-if", "ttft_p50.low > 1.1"]) == OK
    )
    (cell,) = results(tmp_path)["ratios"]
    assert cell["ratios"][0]["value"] == pytest.approx(1.0, abs=0.25)  # a busy machine
    assert results(tmp_path)["verdict"].startswith(("No verdict: 3 block", "No difference"))


def test_two_launch_commands_one_after_the_other(tmp_path, monkeypatch):
    """Alternate mode starts and stops each server once a block; logs, plan and units carry no key."""
    monkeypatch.setenv("LOAD_TEST_KEY", "very-secret-key")
    flags = "--startup 0.3 --misa"
    command = f"MARK=1 {sys.executable} {shlex.quote(str(MOCK))} --port {{port}} --api-key very-secret-key {flags}"
    arguments = ["ab", "--a", f"{command} dsa", "--b", f"{command} misa", "--a-expect", "dsa", "--b-expect", "misa"]
    arguments += ["--ab-mode", "alternate", "--blocks", "2", *SMALL, "--api-key-env", "LOAD_TEST_KEY"]
    assert main([*arguments, "--out", str(tmp_path)]) == OK
    assert [u["arm"] for u in units(tmp_path)] == ["A", "B", "B", "A"]
    assert all(u["misa"]["prefill.misa"] > 0 for u in units(tmp_path) if u["arm"] == "B")
    for log in ("server-a.log", "server-b.log"):
        assert (tmp_path / log).read_text().count("ready") == 2
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert b"very-secret-key" not in path.read_bytes(), path
    text = (tmp_path / "server-a.log").read_text()
    assert "api_key='***'" in text
    assert main(["resume", str(tmp_path)]) == USAGE  # the stored commands lack the key


def test_a_launched_server_leaves_nothing_behind(tmp_path):
    """The launched process has a child that holds the port: the whole group goes."""
    child = f"{sys.executable} {shlex.quote(str(MOCK))} --port"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = f"sh -c 'echo $$; {child} {port} & wait' --port {port}"
    assert main(["run", command, *SMALL, "--out", str(tmp_path)]) == OK
    group = int((tmp_path / "server-server.log").read_text().split()[0])
    with pytest.raises(ProcessLookupError):
        os.killpg(group, 0)


def test_a_server_that_dies_is_told_with_its_log(tmp_path, capsys):
    command = f"{sys.executable} -c 'print(\"no GPU here\"); raise SystemExit(4)' --port 1"
    assert main(["run", command, *SMALL, "--out", str(tmp_path)]) == USAGE
    told = capsys.readouterr().err
    assert "exit code 4" in told
    assert "no GPU here" in told


def test_resume_measures_only_what_is_missing(mocks, tmp_path):
    mocks[0].script(ttft=0.01)
    arguments = ["sweep", mocks[0].url, "--concurrencies", "1", "2", "--blocks", "2", *SMALL, "--out", str(tmp_path)]
    assert main(arguments) == OK
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "units").iterdir()}
    gone = sorted(before)[0]
    for broken, why in (('{"arm": "x', "expected JSON, got EOF"), (None, "expected a unit, got Is a directory")):
        gone.unlink()
        gone.mkdir() if broken is None else gone.write_text(broken)
        with pytest.raises(LoadError, match=f"{gone.name}: {why}.*; remove it, and `resume`"):
            Store(tmp_path, Keys()).units()
    assert main(["resume", str(tmp_path)]) == USAGE  # the directory is in the way
    gone.rmdir()
    assert main(["resume", str(tmp_path)]) == OK
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "units").iterdir()}
    assert after.keys() == before.keys()
    assert {p for p in after if after[p] != before[p]} == {gone}
    assert main([*arguments, "--seed", "7"]) == OK  # another workload: nothing is taken over
    assert len(list((tmp_path / "units").iterdir())) == 2 * len(before)


def test_the_report_has_the_command_of_its_figures(mocks, tmp_path, monkeypatch):
    """The first command where a run goes on, the second where another one is measured into the same folder."""
    monkeypatch.setenv("LOAD_TEST_KEY", "0")  # which is erased from the URL in the stored plan
    mocks[0].script(ttft=0.01)
    arguments = ["run", mocks[0].url, *SMALL, "--api-key-env", "LOAD_TEST_KEY", "--out", str(tmp_path), "--input-len"]
    for length, more in (("200", []), ("200", ["--fail-if"]), ("300", [])):
        assert main([*arguments, length, *more]) == OK
        told = json.loads((tmp_path / "environment.json").read_text())["command"]
        assert told.endswith(length)
        assert told in html.unescape((tmp_path / "report.html").read_text())


def test_a_folder_takes_one_run_at_a_time(mocks, tmp_path, capsys):
    mocks[0].script()
    for command, words in ((main, ["run", mocks[0].url, *SMALL]), (quality, ["needles", mocks[0].url])):
        with Store(tmp_path, Keys()):
            assert command([*words, "--out", str(tmp_path)]) == USAGE
        assert "expected a folder that no other run writes to" in capsys.readouterr().err
    assert mocks[0].sent() == {}
    assert main(["run", mocks[0].url, *SMALL, "--out", str(tmp_path)]) == OK


def test_compare_pairs_two_earlier_runs(mocks, tmp_path):
    old, new = tmp_path / "old" / "out", tmp_path / "new" / "out"  # whose last names are one
    for folder, ttft, blocks in ((old, 0.03, "2"), (new, 0.06, "3")):
        mocks[0].script(ttft=ttft)
        assert main(["run", mocks[0].url, *SMALL, "--blocks", blocks, "--out", str(folder)]) == OK
    out = tmp_path / "both"
    gate = ["--fail-if", "ttft_p50 > 1.5"]
    assert main(["compare", str(old), str(new), "--out", str(out), *gate]) == GATE_FAILED
    assert results(out)["ratios"][0]["ratios"][0]["value"] == pytest.approx(2.0, rel=0.15)
    page = (out / "report.html").read_text()
    assert "not interleaved" in page
    assert "1 of 3 valid blocks" in page
    mocks[0].script()
    other = tmp_path / "other"
    assert main(["run", mocks[0].url, *SMALL, "--seed", "3", "--api", "chat", "--out", str(other)]) == OK
    for words in ([old, other], [old, old], [old, new, "--out", old], [old, new, "--arms", "x", "server"]):
        assert main(["compare", "--out", str(out), *map(str, words)]) == USAGE


def test_the_servers_own_count_verifies_the_shared_prefix(mocks, tmp_path):
    mocks[0].script(ttft=0.005)
    share = ["--shared-prefix", "75", "--prefix-groups", "2", "--input-len", "2k", "--concurrency", "2"]
    assert main(["run", mocks[0].url, *SMALL, *share, "--out", str(tmp_path)]) == OK
    seen = figures(tmp_path)
    assert seen["cached_share"] == seen["cached_wanted_share"] == 0.75
    assert seen["cached_error_max"] == 0
    assert seen["queue_s_p50"] == 0.25
    assert seen["prefill_s_p50"] == pytest.approx(0.5)
    assert seen["server_queue_s_mean"] == pytest.approx(0.25)


@pytest.mark.parametrize("api", ["generate", "completions", "chat"])
def test_turns_hit_what_went_before(mocks, tmp_path, api):
    mocks[0].script(ttft=0.005, itl=0.0)
    turns = ["--turns", "3", "--turn-len", "100", "--api", api, "--output-len", "40"]
    assert main(["run", mocks[0].url, *SMALL, *turns, "--out", str(tmp_path)]) == OK
    records = units(tmp_path)[0]["records"]
    assert len(records) == 12
    for r in records:
        assert r["error"] is None
        if r["turn"]:
            assert r["cached_tokens"] >= 1024 // 64 * 64 - 64
        if api != "chat":
            assert r["prompt_tokens"] == r["prompt_wanted"] == 1024 + r["turn"] * 140
            assert abs(r["cached_tokens"] - r["cached_wanted"]) <= 64
        elif r["turn"] == 0:
            assert r["prompt_tokens"] == 1024  # the template counted, the text fitted to it


@pytest.mark.parametrize(("answer", "wrong"), [("needle", 0.0), ("", 1.0)])
def test_needles_under_load(mocks, tmp_path, capsys, answer, wrong):
    mocks[0].script(ttft=0.005, answer=answer)
    run = ["run", mocks[0].url, *SMALL, "--needles", "2", "--output-len", "12", "--fail-if", "needle_wrong > 0.5"]
    assert main([*run, "--concurrency", "2", "--out", str(tmp_path)]) == (GATE_FAILED if wrong else OK)
    assert figures(tmp_path)["needle_wrong"] == wrong
    assert figures(tmp_path)["needles"] == 4
    told = "server at 1k · concurrency 2: 100.0% of 4 needles are wrong"
    assert (told in capsys.readouterr().out) is bool(wrong)


def test_a_faster_arm_that_fails_more_gets_no_verdict(mocks, tmp_path):
    mocks[0].script(ttft=0.03)
    mocks[1].script(ttft=0.01, fault="500", fault_every=4)
    servers = ["--a", mocks[0].url, "--b", mocks[1].url, "--blocks", "2"]
    assert (
        main(["ab", *servers, *SMALL, "--warmup", "0", "--out", str(tmp_path), "--fail-if", "error_rate > 0"])
        == GATE_FAILED
    )
    result = results(tmp_path)
    assert result["verdict"].startswith("No verdict: at 1k")
    assert result["arms"][1]["errors"] == {"http_500": 2}
    assert result["arms"][1]["figures"]["error_rate"] == 0.25
    assert "sk-echoed-back" not in "".join(p.read_text() for p in (tmp_path / "units").iterdir())


@pytest.mark.parametrize(
    ("script", "expect", "code"),
    [
        ({"misa": "misa"}, "misa", OK),
        ({"misa": "misa", "misa_calls": False}, "misa", INVALID),
        ({"misa": "misa"}, "hisa", USAGE),
        ({"misa": "misa"}, "dsa", USAGE),
        ({}, "misa", USAGE),
        ({}, "dsa", OK),
    ],
)
def test_the_arm_runs_what_it_claims(mocks, tmp_path, capsys, script, expect, code):
    mocks[0].script(ttft=0.005, **script)
    assert main(["run", mocks[0].url, *SMALL, "--expect", expect, "--out", str(tmp_path)]) == code
    if code == INVALID:
        assert "misa did not run" in results(tmp_path)["verdict"]
    if code == USAGE:
        assert "expected" in capsys.readouterr().err


def test_a_saturated_client_is_no_result(mocks, tmp_path):
    mocks[0].script(ttft=0.005)
    assert main(["run", mocks[0].url, *SMALL, "--max-lag-s", "1e-7", "--out", str(tmp_path)]) == INVALID
    assert "the client was saturated" in results(tmp_path)["verdict"]
    assert any("stood still" in note for note in results(tmp_path)["arms"][0]["notes"])
    assert main(["run", mocks[0].url, *SMALL, "--out", str(tmp_path)]) == OK  # invalid units are not kept


def test_open_loop_keeps_its_times(mocks, tmp_path):
    """A slow server does not slow the arrivals down: ten requests a second, each held for a second."""
    mocks[0].script(ttft=1.0)
    load = ["--arrival", "constant", "--rate", "10", "--requests", "10"]
    assert main(["run", mocks[0].url, *SMALL, *load, "--out", str(tmp_path)]) == OK
    records = units(tmp_path)[0]["records"]
    assert [r["due"] for r in records] == pytest.approx([i / 10 for i in range(10)])
    assert all(0 <= r["dispatched"] - r["due"] < 0.2 for r in records)
    assert records[-1]["dispatched"] < records[0]["first"] + 0.2


def test_bounds_hold(mocks, tmp_path):
    """Nothing is sent after the duration, and what hangs is cut off."""
    mocks[0].script(ttft=0.05)
    start = time.monotonic()
    bounds = [
        "--requests",
        "1000",
        "--duration-s",
        "0.5",
        "--input-len",
        "300",
        "--text",
        "ids",
        "--request-timeout-s",
        "1",
    ]
    assert main(["run", mocks[0].url, *PATIENT, "--output-len", "4", *bounds, "--out", str(tmp_path / "a")]) == OK
    assert 3 <= figures(tmp_path / "a")["requests"] <= 12
    mocks[0].script(fault="stall")
    (tmp_path / "slo.toml").write_text("ttft = 1.0")
    stuck = [*bounds, "--warmup", "0", "--slo", str(tmp_path / "slo.toml")]
    assert main(["run", mocks[0].url, *PATIENT, "--output-len", "4", *stuck, "--out", str(tmp_path / "b")]) == INVALID
    assert results(tmp_path / "b")["arms"][0]["errors"] in ({"timeout": 1}, {"stall": 1})
    assert figures(tmp_path / "b")["slo_share"] == 0
    assert time.monotonic() - start < 20


def test_kept_load_surrounds_the_last_request(mocks, tmp_path):
    mocks[0].script(ttft=0.05, itl=0.01)
    keep = ["--cooldown", "keep", "--concurrency", "3", "--requests", "4"]
    assert main(["run", mocks[0].url, *SMALL, *keep, "--out", str(tmp_path)]) == OK
    assert figures(tmp_path)["requests"] == 4
    assert len(mocks[0].sent()) > 4 + 1  # measured, warm-up, and the kept load


def test_remote_targets_need_a_word(tmp_path, capsys):
    assert main(["run", "http://8.8.8.8:80", *SMALL, "--out", str(tmp_path)]) == USAGE
    assert "--allow-remote" in capsys.readouterr().err


def test_text_needs_a_tokenizer(mocks, tmp_path, capsys):
    mocks[0].script(tokenizer=False)
    assert main(["run", mocks[0].url, *SMALL, "--out", str(tmp_path)]) == USAGE
    assert "--text ids" in capsys.readouterr().err
    assert (
        main(["run", mocks[0].url, *SMALL, "--text", "ids", "--id-range", "100", "350", "--out", str(tmp_path)]) == OK
    )


def test_text_from_a_file(mocks, tmp_path):
    mocks[0].script(ttft=0.005)
    (tmp_path / "book.txt").write_text("Ein Märchen, das länger ist. " * 300, encoding="utf-8")
    assert (
        main(["run", mocks[0].url, *SMALL, "--text", str(tmp_path / "book.txt"), "--out", str(tmp_path / "out")]) == OK
    )
    assert figures(tmp_path / "out")["prompt_error_max"] == 0


def test_the_plan_needs_no_server():
    command = cli.Sweep(
        server="http://127.0.0.1:1", grid=cli.Grid(contexts=("32k", "64k", "128k"), concurrencies=(1, 4, 16))
    )
    plan = cli.plan_of(command)
    assert len({c.digest() for c in plan.cells}) == 9
    assert urlsplit(plan.arms[0].server).port == 1


def test_gaps_are_per_token_and_add_up(mocks, tmp_path):
    """Chunks of 4 tokens at 10 ms a token: ITL is near 10 ms, not 40, and all gaps together are the stream's length."""
    mocks[0].script(ttft=0.02, itl=0.01, chunk=4)
    assert main(["run", mocks[0].url, *SMALL, "--output-len", "16", "--out", str(tmp_path)]) == OK
    for r in units(tmp_path)[0]["records"]:
        assert all(tokens % 4 == 0 for tokens in r["gap_tokens"])
        spent = sum(gap * tokens for gap, tokens in zip(r["gaps"], r["gap_tokens"], strict=True))
        assert spent == pytest.approx(r["last"] - r["first"], rel=1e-9)
    assert 0.008 < figures(tmp_path)["itl_p50"] < 0.02


def test_what_a_million_tokens_cost(mocks, tmp_path):
    """Two GPUs at 3.6 an hour cost 0.002 a second."""
    mocks[0].script(ttft=0.02)
    words = [*SMALL, "--price-per-gpu-hour", "3.6", "--gpus", "2", "--blocks", "2"]
    assert main(["run", mocks[0].url, *words, "--out", str(tmp_path)]) == OK
    seen = figures(tmp_path)
    out, both = seen["output_throughput"], seen["output_throughput"] + seen["input_throughput"]
    assert seen["cost_million_output_tokens"] == pytest.approx(2000 / out)
    assert seen["cost_million_tokens"] == pytest.approx(2000 / both)
    assert "cost of a million output tokens" in (tmp_path / "report.html").read_text()
    assert "tokens_per_joule" not in seen or seen["tokens_per_joule"] > 0
