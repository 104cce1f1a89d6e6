"""The entry point as SGLang calls it: off means off, and a mistake stops the process instead of being logged."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from datetime import timedelta

import pytest
from torch import distributed

from sglang_misa import plugin, runtime, versions
from sglang_misa.admission import AdmissionError
from sglang_misa.config import ENV, PRESETS

# Loads every installed plugin under each value of the variable in a fork of its own, as each process of a server does,
# and prints which hooked functions changed. What a fork says goes into <name>.1 and <name>.2, its end to the caller.
# No process waits for its interpreter to take SGLang apart.
LOAD = """
import json, os, sys
from sglang.srt.plugins import load_plugins
from sglang_misa.config import ENV
from sglang_misa.patches import register

entries = (register.LOAD_MODEL, *register.PATCHES)

def functions():
    result = {}
    for patch in entries:
        owner, name = register._locate(patch.target)
        result[patch.target] = vars(owner)[name]
    return result

before, ends = functions(), {}
for case, value in json.loads(sys.argv[1]).items():
    if os.fork() == 0:
        for stream in (1, 2):
            os.dup2(os.open(f"{case}.{stream}", os.O_CREAT | os.O_WRONLY, 0o600), stream)
        os.environ.update({} if value is None else {ENV: value})
        try:
            load_plugins()
        except SystemExit as end:
            print(end, file=sys.stderr, flush=True)
            os._exit(1)
        after = functions()
        print(json.dumps([target for target in before if before[target] is not after[target]]), flush=True)
        os._exit(0)
    ends[case] = os.waitstatus_to_exitcode(os.wait()[1])
print(json.dumps(ends), flush=True)
os._exit(0)
"""


def python(code, *arguments, cwd=None, **environ):
    """Run `code` in a process of its own; a value of None removes the variable."""
    merged = {**os.environ, **environ}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        env={name: value for name, value in merged.items() if value is not None},
        cwd=cwd,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def loads(tmp_path_factory):
    """How loading the plugins under a value of the variable ended, and what it said. SGLang is imported once."""
    folder = tmp_path_factory.mktemp("loads")
    run = python(LOAD, json.dumps({"off": None, "misa": "misa", "malformed": "{"}), cwd=folder, **{ENV: None})
    assert run.returncode == 0, run.stderr
    return {
        case: subprocess.CompletedProcess(case, end, *((folder / f"{case}.{n}").read_text() for n in (1, 2)))
        for case, end in json.loads(run.stdout.splitlines()[-1]).items()
    }


def test_the_module_is_cheap_to_import():
    heavy = ("torch", "sglang", "prometheus_client", "transformers")
    run = python(f"import sys, sglang_misa.plugin; print([m for m in {heavy} if m in sys.modules])")
    assert run.stdout.strip() == "[]", run.stderr


def test_off_means_off(loads):
    run = loads["off"]
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == []


def test_an_empty_variable_is_off():
    run = python(
        "import sys; from sglang_misa import plugin; plugin.load(); print('sglang' in sys.modules)", **{ENV: " "}
    )
    assert run.stdout.strip() == "False", run.stderr


def test_on_hooks_load_model_alone(loads):
    from sglang_misa.patches import register

    run = loads["misa"]
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == [register.LOAD_MODEL.target]


MALFORMED = {
    "broken JSON": ("{", "expected one JSON object"),
    "unknown preset": ("mISA", "expected one JSON object or one of dsa, misa, misa-hier, hisa, misa-hisa"),
    "unknown name": ('{"prefill": {"head": 8}}', "unknown name, did you mean heads?"),
    "impossible": ('{"decode": {"candidates": 8192}}', "set --misa-decode-heads, --misa-decode-blocks"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_variable_is_named(monkeypatch, name):
    value, words = MALFORMED[name]
    monkeypatch.setenv(ENV, value)
    with pytest.raises(SystemExit) as caught:
        plugin.load()
    assert "sglang-misa cannot use this configuration" in str(caught.value)
    assert words in str(caught.value)


def test_a_malformed_variable_gets_past_sglangs_loader(loads):
    run = loads["malformed"]
    assert run.returncode == 1
    assert run.stderr.splitlines()[-2].startswith("sglang-misa cannot use this configuration")
    assert run.stdout == ""


def test_an_unknown_sglang_stops_the_process(monkeypatch):
    monkeypatch.setenv(ENV, "misa")
    monkeypatch.setattr(versions, "installed", lambda: "0.5.99")
    with pytest.raises(SystemExit, match=r"got 0\.5\.99"):
        plugin.load()


@pytest.fixture
def disarmed(monkeypatch):
    monkeypatch.setattr(runtime, "_runtime", None)


def make_runtime(**changes):
    return replace(runtime.Runtime(PRESETS["misa"], 64, 2048, 8192, "cpu", 0, 1), **changes)


def test_hooks_before_arming_raise(disarmed):
    with pytest.raises(AdmissionError, match=r"before ModelRunner\.load_model"):
        runtime.current()


def test_arming_twice_alike_is_fine_and_otherwise_not(disarmed):
    runtime.arm(make_runtime())
    runtime.arm(make_runtime())
    assert runtime.current() == make_runtime()
    with pytest.raises(AdmissionError, match="expected one runtime a process"):
        runtime.arm(make_runtime(index_heads=32))


@pytest.fixture
def meet():
    """Lets the given ranks meet in a real store, each in a thread; returns the error of each, or None."""
    from sglang_misa.patches import model_runner

    def run(*runtimes):
        port = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        errors = {}

        def one(armed):
            store = distributed.TCPStore("127.0.0.1", port.port, is_master=False)
            try:
                model_runner._meet(store, armed, timedelta(seconds=2))
            except AdmissionError as error:
                errors[armed.rank] = str(error)

        threads = [threading.Thread(target=one, args=(armed,)) for armed in runtimes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return errors

    return run


def test_ranks_armed_alike_meet(meet):
    assert meet(*(make_runtime(rank=rank, ranks=3) for rank in range(3))) == {}


def test_a_rank_that_is_not_armed_stops_the_others(meet):
    errors = meet(make_runtime(rank=0, ranks=3), make_runtime(rank=2, ranks=3))
    assert set(errors) == {0, 2}
    assert all("expected all 3 ranks armed, got nothing from [1]" in text for text in errors.values())


def test_a_rank_with_other_settings_stops_the_others(meet):
    errors = meet(make_runtime(rank=0, ranks=2), make_runtime(rank=1, ranks=2, config=PRESETS["hisa"]))
    assert "rank 1: expected the settings of rank 0" in errors[0]
    assert "rank 0: expected the settings of rank 1" in errors[1]
