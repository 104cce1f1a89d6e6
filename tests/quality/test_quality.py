"""The quality bench against servers whose answers are known."""

import json
import math
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from quality.scripted import LAYERS, TOPK, Script, serving

from sglang_misa import http_request
from sglang_misa.bench.load import servers
from sglang_misa.bench.load.control import Control
from sglang_misa.bench.load.servers import ArmServer
from sglang_misa.bench.load.settings import LoadError, Protocol
from sglang_misa.bench.quality import asking, questions
from sglang_misa.bench.quality.cli import main

NEEDLES = ["--lengths", "4k", "6k", "--depths", "3", "--repeats", "2", "--new-tokens", "12"]


@pytest.fixture
def pair():
    """Two scripts and their servers' URLs."""
    with ExitStack() as stack:
        scripts = Script(), Script()
        yield *scripts, *(stack.enter_context(serving(script)) for script in scripts)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"text {n} " * 20}) + "\n" for n in range(2)))
    return file


def read(folder: Path, name: str):
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize("template", questions.TEMPLATES)
@pytest.mark.parametrize("api", ["generate", "completions"])
def test_needles_are_found_where_the_server_sees_them(pair, tmp_path, template, api):
    _, second, a, b = pair
    second.blind = (0.3, 0.7)
    words = ["needles", a, b, *NEEDLES, "--template", template, "--api", api, "--out", str(tmp_path)]
    assert main(words) == 0
    results = read(tmp_path, "needles")
    assert {tuple(row) for row in results} == {("arm", "length", "depth", "asked", "found", "model", "commit")}
    assert all(row["found"] == row["asked"] == 2 for row in results if row["arm"] == "stock")
    missed = {row["depth"] for row in results if row["found"] < row["asked"]}
    assert missed == {0.5}
    for body in second.asked:
        assert len(body.get("input_ids", body.get("prompt"))) in (4096, 6144)
    assert (tmp_path / "plots" / "needles.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "report.html").read_text()


def test_a_run_goes_on_with_what_is_missing(pair, tmp_path):
    first, second, a, b = pair
    words = ["needles", a, b, *NEEDLES, "--out", str(tmp_path)]
    assert main(words) == 0
    before = len(first.asked) + len(second.asked)
    next((tmp_path / "answers").glob("*.json")).unlink()
    assert main(words) == 0
    assert len(first.asked) + len(second.asked) == before + 1


def test_out_of_time_the_questions_that_all_arms_answered_are_told(pair, tmp_path, capsys):
    first, _, a, b = pair
    words = ["needles", a, b, *NEEDLES, "--out", str(tmp_path)]
    assert main(words) == 0
    first.hang_up = 1  # a question more would fail
    next((tmp_path / "answers").glob("*.json")).unlink()
    assert main([*words, "--limit-s", "0"]) == 0
    assert "1 of 12 questions left out, for --limit-s" in capsys.readouterr().out
    assert sum(row["asked"] for row in read(tmp_path, "needles")) == 2 * 11


def test_a_server_that_comes_back_is_asked_again(pair, tmp_path):
    first, _, a, b = pair
    first.hang_up = 1
    assert main(["needles", a, b, *NEEDLES, "--out", str(tmp_path)]) == 0
    assert len(first.asked) == 12 + 1


def test_a_busy_server_is_asked_again_after_the_pause_it_names(pair, tmp_path, capsys, monkeypatch):
    first, _, a, b = pair
    words, paused = ["needles", a, b, *NEEDLES, "--out", str(tmp_path)], []
    monkeypatch.setattr(http_request, "time", SimpleNamespace(sleep=paused.append))
    first.busy = [429, 503, 500, *[503] * http_request.TRIES]  # for another reason it is not asked again
    assert main(words) == 2
    assert "got HTTP 500" in capsys.readouterr().err
    assert paused == [7.0, 7.0]
    assert main(words) == 2
    assert "got HTTP 503" in capsys.readouterr().err
    assert len(paused) == 2 + http_request.TRIES - 1
    assert main(words) == 0
    assert all(row["found"] == row["asked"] for row in read(tmp_path, "needles"))


def test_prompts_that_do_not_fit_are_refused_before_any_is_asked(pair, tmp_path, capsys):
    first, second, a, b = pair
    second.room = 6144
    assert main(["needles", a, b, *NEEDLES, "--out", str(tmp_path)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "arm other: expected prompts under 6144 tokens, its max_req_input_len, got 6144 in 6144 · 0.00 · 1;" in said
    assert first.asked == second.asked == []


@pytest.mark.parametrize("api", ["generate", "completions"])
@pytest.mark.parametrize("miscount", [-4089, 1])
def test_an_answer_to_other_ids_than_were_sent_is_refused(pair, tmp_path, capsys, api, miscount):
    _, second, a, b = pair
    second.miscount = miscount
    assert main(["needles", a, b, *NEEDLES, "--api", api, "--out", str(tmp_path)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "arm other: expected 4096 prompt tokens of" in said
    assert f"as sent, got {4096 + miscount}; the server cuts prompts off" in said


def test_a_count_that_is_not_told_or_not_known_is_no_reason():
    question = questions.Question(name="one", ids=(1, 2), new_tokens=1)
    raw = {"text": "x", "output_ids": [1], "meta_info": {}}
    assert asking.read(raw, Protocol(), "stock", question, 0.0).prompt_tokens == 0
    chat = {"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": 9}}
    assert asking.read(chat, Protocol(api="chat"), "stock", question, 0.0).prompt_tokens == 9


def test_a_file_in_the_way_is_told_with_the_way_to_go_on(pair, tmp_path, capsys):
    _, _, a, b = pair
    (tmp_path / "report.html").mkdir()
    assert main(["needles", a, b, *NEEDLES, "--out", str(tmp_path)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "report.html: expected a file with room to write, got Is a directory" in said
    assert said.endswith("make room there and repeat the same command with --out")


def test_a_server_that_stays_away_is_told_with_the_way_to_go_on(pair, tmp_path, capsys, monkeypatch):
    first, _, a, b = pair
    first.hang_up = 1
    monkeypatch.setattr(servers, "BACK_S", -1.0)
    monkeypatch.setattr(Control, "healthy", lambda _: not first.asked)
    assert main(["needles", a, b, *NEEDLES, "--out", str(tmp_path)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert said.endswith("what was measured is kept: start it and repeat the same command with --out")


def test_three_arms_are_each_held_against_the_first(pair, tmp_path):
    _, second, a, b = pair
    second.blind, second.recall = (0.0, 1.0), 0.5
    listed = tmp_path / "listed.json"
    other = {"arm": "low", "length": 4096, "depth": 0.5, "asked": 9, "found": 9, "model": "other", "commit": "old"}
    listed.write_text(json.dumps([other, {**other, "model": "scripted"}]))
    words = ["all", a, a, b, "--names", "stock", "same", "low", *NEEDLES, "--json", str(listed)]
    assert main([*words, "--out", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "same: no significant loss" in page
    assert "low: a significant loss (sign test: p = 0.000488)" in page
    assert {(row["arm"], row["recall"]) for row in read(tmp_path, "recall")} == {("low", 0.5)}
    assert {row["arm"]: row["equal"] for row in read(tmp_path, "agree")}["same"] == 1
    assert len(read(tmp_path, "times")) == 3 * 2
    results = json.loads(listed.read_text())
    assert results[0] == other
    assert len(results) == 1 + len(read(tmp_path, "needles"))
    assert [row for row in results[1:] if row["arm"] == "low" and row["found"]] == []


def test_a_model_that_cannot_read_is_not_held_against_the_selection(pair, tmp_path, capsys):
    first, _, a, b = pair
    first.blind = (0.0, 1.0)
    assert main(["needles", a, b, *NEEDLES, "--out", str(tmp_path)]) == 2
    assert "says nothing of the selection" in " ".join(capsys.readouterr().err.split())
    assert "says nothing of the selection" in (tmp_path / "report.html").read_text()


def test_agreement_is_counted_up_to_the_first_difference(pair, prompts, tmp_path):
    first, second, a, b = pair
    first.reply, second.reply, second.probability = "abcdefgh", "abcdXfgh", 0.6
    words = ["agree", a, b, "--prompts", str(prompts), "--least", "50", "--new-tokens", "8"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    wanted = 0.9 * math.log(0.9 / 0.6) + 0.1 * math.log(0.1 / 0.4)
    for row in read(tmp_path / "run", "agree"):
        assert (row["equal"], row["differs"]) == (0.5, 4)
        assert row["kl"] == pytest.approx(wanted)


@pytest.mark.parametrize(("shift", "kept"), [(0, 1.0), (2, (TOPK - 2) / TOPK)])
def test_recall_is_the_share_of_stocks_tokens(pair, prompts, tmp_path, shift, kept):
    first, second, a, b = pair
    second.shift = shift
    words = ["recall", a, b, "--prompts", str(prompts), "--least", "50", "--index-topk", str(TOPK)]
    assert main([*words, "--new-tokens", "4", "--out", str(tmp_path / "run")]) == 0
    results = read(tmp_path / "run", "recall")
    assert [(row["phase"], row["layer"]) for row in results] == [
        (phase, layer) for phase in ("prefill", "decode") for layer in range(LAYERS)
    ]
    assert all(row["recall"] == pytest.approx(kept) for row in results)
    before = len(first.asked) + len(second.asked)
    next((tmp_path / "run/selections").glob("*.npy")).unlink()
    assert main([*words, "--new-tokens", "4", "--out", str(tmp_path / "run")]) == 0
    assert len(first.asked) + len(second.asked) == before + 1, "selections are kept too"
    assert read(tmp_path / "run", "recall") == results


def test_the_audit_is_read_from_the_status(pair, tmp_path):
    first, _, a, _ = pair
    first.recall = 0.75
    assert main(["recall", a, "--audit", "--out", str(tmp_path)]) == 0
    told = {"phase": "prefill", "layer": 0, "recall": 0.75, "p10": 0.5, "rows": 4}
    assert read(tmp_path, "recall") == [{"arm": "server"} | told], "nobody said what it runs"


def test_an_audit_is_of_all_ranks_and_stays_when_a_run_goes_on(pair, tmp_path):
    _, second, a, b = pair
    second.recall, second.ranks = 0.5, 2
    words = ["all", a, b, "--lengths", "4k", "--depths", "2", "--new-tokens", "12", "--out", str(tmp_path)]
    assert main(words) == 0
    (told,) = read(tmp_path, "recall")
    assert (told["arm"], told["recall"], told["rows"]) == ("other", 0.5, 8)
    second.recall = None  # another server, which is asked nothing
    assert main(words) == 0
    assert read(tmp_path, "recall") == [told]
    second.recall = 0.75
    assert main(words) == 0
    assert [row["recall"] for row in read(tmp_path, "recall")] == [0.75]


@pytest.mark.parametrize(("min_len", "status"), [(0, 0), (5000, 0), (6144, 2)])
def test_a_selection_that_did_not_run_is_not_said_to_lose_nothing(pair, tmp_path, capsys, min_len, status):
    _, second, a, b = pair
    second.policy, second.min_len = {"prefill": "misa", "decode": "dsa"}, min_len
    words = ["needles", a, b, *NEEDLES, "--expect", "dsa", "misa", "--json", str(tmp_path / "listed.json")]
    words += ["--out", str(tmp_path / "run")]
    for _ in range(2):  # and where a run goes on that has nothing left to ask
        assert main(words) == status
        said = capsys.readouterr()
        page = (tmp_path / "run/report.html").read_text()
        refused = "misa: expected calls that misa selects for, got none: stock DSA answered all"
        assert (refused in " ".join(said.err.split())) == (refused in page) == (status == 2)
        assert ("no significant loss" in page) == ("verdict good" in page) == (status == 0)
        partly = "misa: 6 of 12 prompts are under its min_len of 5000 tokens in prefill, where stock DSA selects."
        assert (tmp_path / "listed.json").exists() == (status == 0)
        assert (partly in " ".join(said.out.split())) == (partly in page) == (min_len == 5000)


def test_a_server_that_counts_anew_has_run_what_it_counts(pair, tmp_path, monkeypatch):
    _, second, a, b = pair
    second.policy = {"prefill": "misa", "decode": "dsa"}
    second.asked += [{"input_ids": [0] * 9}] * 99  # of others, before it ends in our run
    monkeypatch.setattr(ArmServer, "recover", lambda _: second.asked.clear())
    second.hang_up = 1
    assert main(["needles", a, b, *NEEDLES, "--expect", "dsa", "misa", "--out", str(tmp_path)]) == 0
    assert len(second.asked) == 12


@pytest.mark.parametrize("words", [[], ["--names", "stock", "same"]])
def test_an_arm_called_stock_is_stock(pair, tmp_path, capsys, words):
    first, _, a, b = pair
    first.policy = {"prefill": "faithful", "decode": "dsa"}
    assert main(["needles", a, b, *NEEDLES, *words, "--out", str(tmp_path)]) == 2
    assert "arm stock: expected stock selection, got faithful" in " ".join(capsys.readouterr().err.split())
    assert first.asked == []


def test_tasks_score_every_output_or_the_best_f1(pair, tmp_path):
    first, _, a, _ = pair
    first.reply = "the red fox"
    (tmp_path / "ruler.jsonl").write_text(json.dumps({"input": "which?", "outputs": ["fox", "wolf"]}) + "\n")
    row = {"context": "long", "input": "who?", "answers": ["a wolf", "red fox"]}
    (tmp_path / "qa.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["tasks", a, "--folder", str(tmp_path), "--out", str(tmp_path / "run")]) == 0
    scores = {row["task"]: row["score server"] for row in read(tmp_path / "run", "tasks")}
    assert scores == {"ruler · 1": 0.5, "qa · 1": pytest.approx(0.8)}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["agree", "--prompts", "{empty}"], "expected prompts, got an empty file"),
        (["agree", "--prompts", "{short}"], "expected at least 2049 tokens"),
        (["agree", "--prompts", "{missing}"], "expected a readable UTF-8 file"),
        (["recall"], "expected prompts to select on"),
        (["recall", "--audit"], "expected recall in /server_info"),
        (["needles", "--names", "one", "one"], "expected 2 different ones for as many servers"),
        (["needles", "--expect", "dsa"], "expected a selection for each of the 2 servers"),
        (["needles", "--json", "{missing}/needles.json"], "expected a file in a folder that exists"),
        (["needles", "--json", "{short}"], "expected a list of results"),
        (["needles", "--limit-s", "0", "--lengths", "4k"], "expected time for one question"),
        (["needles", "--lengths", "100", "--depths", "2"], "expected room for 9 facts"),
        (["needles", "--lengths", "4k", "--new-tokens", "4"], "orchard, which is 8 tokens, got 4; raise --new-tokens"),
        (["tasks", "--folder", "{folder}"], "expected outputs or answers"),
    ],
)
def test_what_cannot_be_done_is_refused(pair, tmp_path, capsys, words, told):
    _, _, a, b = pair
    files = {name: tmp_path / f"{name}.jsonl" for name in ("empty", "short", "missing")}
    files["empty"].write_text("")
    files["short"].write_text('{"prompt": "short"}\n')
    words = [word.format(folder=tmp_path, **files) for word in words]
    assert main([words[0], a, b, *words[1:], "--out", str(tmp_path / "run")]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_a_line_ends_where_json_lines_end(tmp_path):
    """And not at what else ends one for Unicode, which a text may hold."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\u2028b\x85c"}\n{"prompt": "d"}\r\n')
    found = questions.prompts(tmp_path / "p.jsonl", lambda text: list(text.encode()), 1, 1)
    assert [bytes(each.ids).decode() for each in found] == ["a\u2028b\x85c", "d"]
    (tmp_path / "p.jsonl").write_text("[" * 100_000)
    with pytest.raises(LoadError, match=r"p\.jsonl:1: expected one JSON object"):
        questions.prompts(tmp_path / "p.jsonl", lambda text: [1], 1, 1)


@pytest.mark.parametrize(
    "words",
    [
        *(["needles", "--lengths", "many"], ["needles", "--depths", "1"], ["needles", "--json", "/no/such/file.json"]),
        *(["agree", "--prompts", "/no/such"], ["recall"], ["tasks", "--folder", "/no/such"]),
        ["needles", "--text", "/no/such"],
        ["needles", "--expect", "dsa", "faithfull"],
        *(["needles", "--lengths", "4k", "4096"], ["needles", "--lengths", "uniform:4k:8k"]),
        *(["needles", "--lengths", "900000000k"], ["needles", "--depths", "999999999999"]),
        ["needles", "--repeats", "999999999"],
        *(["recall", "--audit", "--limit-s", "nan"], ["recall", "--audit", "--limit-s", "-1"]),
    ],
)
def test_words_are_judged_before_a_server_is_asked(tmp_path, capsys, words):
    nobody = ["http://127.0.0.1:1", "http://127.0.0.1:2"]
    assert main([words[0], *nobody, *words[1:], "--out", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert "expected" in told
    assert "expected a server" not in told
    assert not (tmp_path / "run").exists()


def test_a_server_that_returns_no_selections_is_refused(pair, prompts, tmp_path, capsys):
    _, second, a, b = pair
    second.selections = False
    words = ["recall", a, b, "--prompts", str(prompts), "--least", "50", "--index-topk", str(TOPK)]
    assert main([*words, "--out", str(tmp_path / "run")]) == 2
    assert "--enable-return-indexer-topk" in " ".join(capsys.readouterr().err.split())


def test_needles_lie_anywhere_in_a_block() -> None:
    """Lengths are powers of two and depths eighths, so that only the edges of blocks would be asked for."""

    known: dict[str, int] = {}

    class Words:
        def encode(self, text: str) -> np.ndarray:
            return np.array([known.setdefault(word, 1000 + len(known)) for word in text.split()])

        def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
            return rng.integers(0, 1000, count)

    source, places = Words(), Counter()
    template, depths = questions.TEMPLATES["pairs"], np.linspace(0, 1, 9)
    nearest = dict.fromkeys(depths, 1024)
    for asked in questions.needles(source, template, [1024, 4096, 32768], depths, 10, 8, 1, seed=0):
        place = asked.ids.index(int(source.encode(f"{asked.answers[0]}.")[0]))
        assert abs(place - asked.depth * asked.length) <= questions.SPREAD + 64
        if asked.length == 1024:
            nearest[asked.depth] = min(nearest[asked.depth], place)
        else:
            places[place % 512 // 64] += 1
    assert [*nearest.values()] == sorted(nearest.values()), "depths of a short prompt are apart"
    assert len(places) == 8
    assert max(places.values()) < places.total() / 4


def test_an_answer_of_another_kind_is_refused_in_one_sentence():
    question = questions.Question(name="one", ids=(1,), new_tokens=1)
    raw = {"text": "x", "output_ids": ["a"], "meta_info": {}}
    with pytest.raises(LoadError, match="expected an answer by --api generate") as refused:
        asking.read(raw, Protocol(), "stock", question, 0.0)
    assert "pydantic" not in str(refused.value)
