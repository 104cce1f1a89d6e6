"""Options are judged before anything is sent: by themselves, beside the others, and when a run is taken up again."""

from __future__ import annotations

import json
import re

import pytest
from load.helpers import SMALL

from sglang_misa.bench.load.cli import main
from sglang_misa.bench.load.plan import Slo
from sglang_misa.bench.load.safety import check_target
from sglang_misa.bench.load.selection import STOCK, known
from sglang_misa.bench.load.settings import LoadError
from sglang_misa.bench.load.shell import OK, USAGE
from sglang_misa.config import PRESETS


@pytest.mark.parametrize(
    "words",
    [
        ["--fail-if", "ttft_p50 > 1.0.2"],
        ["--fail-if", "speed > 1"],
        ["--fail-if", "ttft_p50.high > 1"],
        ["--blocks", "0"],
        ["--confidence", "95"],
        ["--requests", "0"],
        ["--input-len", "32q"],
        ["--text", "/no/such/file"],
        ["--text", "ids", "--id-range", "5", "5"],
        ["--api-key-env", "NO_SUCH_VARIABLE"],
        ["--slo", "/no/such/file"],
        ["--ca-file", "/no/such/file"],
        ["--ca-file", __file__],
        ["--requests", "1000000", "--input-len", "uniform:8k:32k"],
        ["--out", "/proc/nope"],
        ["--input-len", "0"],
        ["--output-len", "uniform:0:8"],
        ["--arrival", "poisson", "--rate", "inf"],
        ["--duration-s", "inf"],
        ["--until-ci", "inf"],
        ["--concurrency", "100000000"],
        ["--arrival", "trace"],
    ],
)
def test_options_are_judged_before_the_first_request(mocks, tmp_path, capsys, words):
    mocks[0].script()
    assert main(["run", mocks[0].url, *SMALL, "--out", str(tmp_path), *words]) == USAGE
    assert "expected" in capsys.readouterr().err
    assert mocks[0].sent() == {}


@pytest.mark.parametrize(
    "words",
    [
        ["--primary", "ttft_max"],
        ["--primary", "ttft_p999"],
        ["--rates", "5", "--concurrencies", "1"],
        ["--rates", "5"],
        ["--concurrencies", "0"],
        ["--arrival", "poisson", "--rates", "-1"],
        ["--arrival", "poisson", "--concurrencies", "4"],
        ["--contexts", "1k", "9z"],
        ["--contexts", "1k", "2k", "1k"],
        ["--concurrencies", "4", "4"],
        ["--names", "a", "a"],
        ["--b", "python -m server"],
        ["--b", "python -m 'server --port 3"],
        ["--fail-if", "error_rate.high > 0.5"],
        ["--fail-if", "ttft_max.low > 5"],
        ["--b-expect", "faithfull"],
        ["--ab-mode", "alternate", "--b-expect", "misa-hierr"],
    ],
)
def test_options_of_two_arms_too(mocks, tmp_path, capsys, words):
    mocks[0].script()
    assert main(["ab", "--a", mocks[0].url, "--b", mocks[1].url, *SMALL, "--out", str(tmp_path), *words]) == USAGE
    assert "expected" in capsys.readouterr().err
    assert mocks[0].sent() == {}


@pytest.mark.parametrize("name", [*PRESETS, *STOCK, "misa+hisa-error-residual-sketch1", "dsa|misa-hier"])
def test_what_a_server_can_run_can_be_expected(name):
    assert known(name)


def test_a_plan_with_a_wrong_option_is_refused_by_resume(mocks, tmp_path, capsys):
    mocks[0].script()
    assert main(["run", mocks[0].url, *SMALL, "--out", str(tmp_path)]) == OK
    plan = json.loads((tmp_path / "plan.json").read_text())
    for wrong in ({"primary": "ttft_max"}, {"confidence": 95}, {"fail_if": ["ttft_p50 >"]}, {"nonsense": 1}):
        (tmp_path / "plan.json").write_text(json.dumps(plan | wrong))
        assert main(["resume", str(tmp_path)]) == USAGE
        assert "expected" in capsys.readouterr().err
    assert main(["resume", str(tmp_path / "nowhere")]) == USAGE
    for broken, why in (("{}", "arms: expected such a field"), ("{", "expected JSON, got EOF")):
        (tmp_path / "plan.json").write_text(broken)
        capsys.readouterr()
        assert main(["resume", str(tmp_path)]) == USAGE
        assert f"{tmp_path / 'plan.json'}: {why}" in capsys.readouterr().err


def test_a_url_from_which_a_key_was_erased_is_refused_by_resume(mocks, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LOAD_TEST_KEY", "0")
    mocks[0].script()
    assert main(["run", mocks[0].url, *SMALL, "--api-key-env", "LOAD_TEST_KEY", "--out", str(tmp_path)]) == OK
    assert main(["resume", str(tmp_path)]) == USAGE
    assert "from which a key was erased" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--rate", "5"],
        ["--burst", "3"],
        ["--arrival", "constant", "--cooldown", "keep"],
        ["--arrival", "poisson", "--concurrency", "4"],
        ["--turn-len", "9"],
        ["--pause-s", "1"],
        ["--prefix-groups", "3"],
        ["--time-scale", "2"],
        ["--max-len", "900"],
        ["--id-range", "5", "900"],
        ["--trace", "t.jsonl", "--turns", "2"],
        ["--trace", "t.jsonl", "--rate", "2"],
        ["--dataset", "d.jsonl", "--turns", "2", "--pause-s", "1"],
        ["--dataset", "d.jsonl", "--input-len", "1k"],
    ],
)
def test_an_option_that_nothing_heeds_is_refused(words, tmp_path, capsys):
    """A rate beside a closed loop, say: nothing would tell that there was none."""
    assert main(["run", "http://127.0.0.1:1", "--out", str(tmp_path), *words]) == USAGE
    assert re.search(r"expected .* beside it, got .* without", capsys.readouterr().err)


@pytest.mark.parametrize(
    "words",
    [
        ["sweep", "--trace", "t.jsonl", "--contexts", "1k", "2k"],
        ["sweep", "--trace", "t.jsonl", "--concurrencies", "1", "2"],
        ["sweep", "--dataset", "d.jsonl", "--contexts", "1k", "2k"],
        ["max", "--trace", "t.jsonl"],
        ["max", "--until-ci", "0.1"],
        ["max", "--concurrency", "4"],
        ["max", "--over", "rate", "--arrival", "poisson", "--rate", "4"],
        ["max", "--start", "9", "--highest", "2"],
        ["max", "--highest", "2.5"],
    ],
)
def test_a_grid_or_a_search_that_would_measure_one_load_twice(words, tmp_path, capsys):
    (tmp_path / "slo.toml").write_text("ttft = 1.0")
    assert main([*words, "--slo", str(tmp_path / "slo.toml"), "--out", str(tmp_path / "out")]) == USAGE
    told = capsys.readouterr().err
    assert "expected" in told
    assert "refused" not in told  # by a server that is not there
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "[contexts.32k]\n", "ttft = inf\n", "ttft = 0\n", "speed = 1\n"])
def test_service_limits_that_limit_nothing(text, tmp_path, capsys):
    (tmp_path / "slo.toml").write_text(text)
    words = ["--slo", str(tmp_path / "slo.toml"), "--out", str(tmp_path / "out")]
    assert main(["run", "http://127.0.0.1:1", *words]) == USAGE
    assert "slo: expected" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "[]", '{"ttft": "fast"}', "[" * 100_000])
def test_broken_limits_are_told_in_one_sentence(tmp_path, text):
    for path in (tmp_path / "slo.json", tmp_path / "slo.toml"):
        path.write_text(text)
        with pytest.raises(LoadError, match="slo: expected a TOML or JSON file") as caught:
            Slo.read(path)
        assert "\n" not in str(caught.value)
        assert "http" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        *("http://127.0.0.1:99999", "http://127.0.0.1:0", "http://127.0.0.1:abc", "http://[::1", "http:///x"),
        *("http://127.0.0.1:1/?a=b", "http://127.0.0.1:1/#a", "http://127.0.0.1:1/v1", f"http://{'a' * 99}:80"),
    ],
)
def test_what_is_no_address_of_a_server(url):
    with pytest.raises(LoadError, match=r"target: expected .*, got"):
        check_target(url, allow_remote=False)
