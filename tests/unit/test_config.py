"""Settings: flags ≡ JSON, and every kind of mistake is named with what to do."""

import argparse
import json
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_misa import config, flags
from sglang_misa.config import PHASES, PRESETS, Audit, ConfigError, Dump, MisaConfig, SelectionPolicy
from sglang_misa.kernels.layout import PAGE, Router
from sglang_misa.policy import ONLY

sizes = st.integers(1, 64).map(lambda pages: pages * PAGE)
heads = st.none() | st.integers(1, 128)


@st.composite
def policies(draw, phase):
    if phase == "prefill" and draw(st.booleans()):
        return SelectionPolicy(exact=True, min_len=draw(st.integers(0, 1 << 20)))
    heads_, blocks = draw(heads), draw(st.none() | st.integers(2, 512))
    block_size = draw(sizes)
    most = None if blocks is None else blocks * block_size
    candidates, sketch = None, None
    if heads_ is not None or blocks is not None:
        candidates = draw(st.none() | st.integers(1, most or 1 << 20))
    if phase == "decode" and candidates is not None:
        sketch = draw(st.sampled_from([None, 1, 2]))
    residual = heads_ is not None and draw(st.booleans())
    return SelectionPolicy(
        heads=heads_,
        router=draw(st.sampled_from([router for router in get_args(Router) if residual or router != "error"])),
        residual=residual,
        blocks=blocks,
        sketch=sketch,
        candidates=candidates,
        block_size=block_size,
        min_len=draw(st.integers(0, 1 << 20)),
        min_rows=draw(st.integers(1, 64)) if phase == "decode" else 1,
        min_tokens=draw(st.integers(0, 1 << 20)) if phase == "decode" else 0,
    )


# What is off has no settings, see MISTAKES.
audits = st.just(Audit()) | st.builds(
    Audit, rows=st.integers(1, 1000), every=st.integers(1, 1000), floor=st.floats(0, 1)
)
dumps = st.just(Dump()) | st.builds(
    Dump,
    folder=st.text("abc/", min_size=1),
    rows=st.integers(1, 1000),
    layers=st.none() | st.lists(st.integers(0, 60), min_size=1).map(tuple),
    gib=st.floats(0.1, 100),
)
configs = st.builds(
    MisaConfig,
    dump=dumps,
    prefill=policies("prefill"),
    decode=policies("decode"),
    audit=audits,
    backend=st.sampled_from(["auto", "kernels", "torch"]),
)


def from_flags(*words):
    parser = argparse.ArgumentParser()
    flags.add_cli_flags(parser)
    return flags.from_flags(parser.parse_args(words))


def flags_of(wanted):
    """The words that say `wanted` in full."""
    words = ["--misa-preset", "dsa"]
    for prefix, values in wanted.model_dump(exclude={"layers"}).items():
        for name, value in values.items() if isinstance(values, dict) else [("", values)]:
            if prefix in PHASES and ONLY.get(name, prefix) != prefix:
                continue
            path = "-".join(filter(None, ("misa", prefix, name))).replace("_", "-")
            path = {"misa-audit-floor": "misa-recall-floor", "misa-dump-folder": "misa-dump"}.get(path, path)
            if (prefix, name, value) != ("dump", "folder", None):
                words += [f"--{path}", spelled(name, value)]
    return words


def spelled(name, value):
    if value is None:
        return "all" if name in ("heads", "blocks", "layers") else "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


@given(configs)
def test_flags_and_json_say_the_same(wanted):
    assert MisaConfig.from_json(wanted.to_json(), "here") == wanted
    assert from_flags(*flags_of(wanted)) == wanted


@given(configs)
def test_every_field_has_a_flag(wanted):
    words = {word for word in flags_of(wanted) if word.startswith("--")}
    starts = {"--misa-config", "--misa-policy", *(f"--misa-{phase}" for phase in PHASES)}
    assert words | starts | {"--misa-dump"} == set(flags.flag_names())


@pytest.mark.parametrize("name", PRESETS)
def test_presets_stand_in_the_variable_and_in_the_flag(name):
    for text in (name, f" {name}\n", json.dumps(name)):
        assert MisaConfig.from_env({config.ENV: text}) == PRESETS[name]
    assert from_flags("--misa-preset", name) == PRESETS[name]


@pytest.mark.parametrize("environ", [{}, {config.ENV: ""}, {config.ENV: "  "}])
def test_no_variable_is_off(environ):
    assert MisaConfig.from_env(environ) is None
    assert from_flags() is None


def test_flags_start_from_faithful_and_json_from_stock_dsa():
    """JSON is the whole configuration, as every process gets it: what it leaves out is not a preset's."""
    flags, data = from_flags("--misa-audit-rows", "4"), MisaConfig.from_json('{"audit": {"rows": 4}}', "here")
    assert (config.preset_name(flags), flags.unread(alone=True)) == ("faithful", ())
    assert (config.preset_name(data), data.unread(alone=True)) == ("dsa", ("audit.rows=4",))


def test_a_file_is_a_starting_point_for_flags(tmp_path):
    path = tmp_path / "misa.json"
    path.write_text(PRESETS["misa-hier"].to_json())
    chosen = from_flags("--misa-config", str(path), "--misa-prefill-heads", "16")
    assert chosen.prefill == PRESETS["misa-hier"].prefill.model_copy(update={"heads": 16})


MISTAKES = {
    "not JSON": ("{", "expected one JSON object or one of dsa, misa"),
    "a number of too many digits": ('{"prefill": {"heads": ' + "9" * 5000 + "}}", "expected one JSON object"),
    "not an object": ("[1]", "the object"),
    "a name that comes twice": ('{"decode": {}, "decode": {"heads": 8}}', "'decode' comes 2 times"),
    "string for a number": ({"prefill": {"heads": "8"}}, "prefill.heads: expected a valid integer, got '8'"),
    "number for a word": (
        {"prefill": {"router": 1}},
        "prefill.router: expected 'mean', 'peak', 'signed', 'weight' or 'error', got 1",
    ),
    "float for an integer": ({"prefill": {"heads": 8.5}}, "prefill.heads"),
    "a floor that nothing is measured against": (
        {"audit": {"floor": 0.9}},
        "audit.floor: expected --misa-audit-rows with it, got 0.9 without",
    ),
    "layers of no dump": ({"dump": {"layers": [5]}}, "dump.layers: expected --misa-dump with it, got (5,) without"),
    "no policy": ({"prefill": None}, "prefill: expected an object for SelectionPolicy, got None"),
    "true for a number": ({"prefill": {"heads": True}}, "prefill.heads"),
    "a policy that is no object": ({"prefill": 8}, "prefill"),
    "no heads": ({"prefill": {"heads": 0}}, "prefill.heads"),
    "more blocks than can be counted": (
        {"decode": {"blocks": 10**20}},
        "decode.blocks: expected a number less than or equal to 2147483647",
    ),
    "one block": ({"decode": {"blocks": 1}}, "decode.blocks"),
    "half a page": (
        {"decode": {"blocks": 64, "block_size": 96}},
        "decode.block_size: expected a multiple of 64, got 96",
    ),
    "floor over one": ({"audit": {"floor": 1.5}}, "audit.floor"),
    "unknown field": ({"prefill": {"head": 8}}, "prefill.head: unknown name, did you mean heads?"),
    "unknown phase": ({"prefil": {}}, "prefil: unknown name, did you mean prefill?"),
    "unknown audit": ({"audit": {"row": 1}}, "audit.row: unknown name, did you mean rows?"),
    "re-ranking all heads": ({"decode": {"candidates": 8192}}, "decode.candidates: expected a policy that leaves"),
    "a residual of no heads": ({"prefill": {"residual": True}}, "prefill.residual: expected routed heads with it"),
    "the error of no residual": (
        {"prefill": {"heads": 3, "router": "error"}},
        "prefill.router: expected a residual with error, which ranks heads by what that would get wrong, got none; set",
    ),
    "a sketch in prefill": (
        {"prefill": {"heads": 8, "sketch": 1, "candidates": 8192}},
        "prefill.sketch: expected none, as prefill reads a key for many rows, got 1",
    ),
    "a sketch without candidates": ({"decode": {"sketch": 2}}, "decode.sketch: expected candidates"),
    "bits that no sketch has": ({"decode": {"sketch": 3, "candidates": 8192}}, "decode.sketch: expected 1 or 2, got 3"),
    "exact with heads": (
        {"prefill": {"exact": True, "heads": 8}},
        "prefill.exact: expected all heads, tokens and keys",
    ),
    "exact in decode": (
        {"decode": {"exact": True}},
        "decode.exact: expected off, as there is no score matrix to save, got",
    ),
    "more candidates than kept": (
        {"prefill": {"blocks": 32, "block_size": 128, "candidates": 8192}},
        "expected at most blocks × block_size = 4096 tokens, got 8192; raise --misa-prefill-blocks",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name):
    data, words = MISTAKES[name]
    text = data if isinstance(data, str) else json.dumps(data)
    with pytest.raises(ConfigError) as caught:
        MisaConfig.from_env({config.ENV: text})
    (problem,) = caught.value.problems
    assert words in problem


@pytest.mark.parametrize("flag", ["--misa-policy", "--misa-config"])
def test_a_file_without_an_end_is_refused(flag):
    with pytest.raises(ConfigError, match=f"{flag}: expected a readable JSON file, got /dev/zero .*more than 16 MiB"):
        from_flags(flag, "/dev/zero")


@pytest.mark.parametrize("name", PRESETS)
def test_a_phase_comes_from_another_preset(name):
    assert from_flags("--misa-preset", "fast", "--misa-decode", name) == MisaConfig(
        prefill=PRESETS["fast"].prefill, decode=PRESETS[name].decode
    )
    changed = from_flags("--misa-prefill", name, "--misa-prefill-min-len", "7")
    assert changed.prefill == PRESETS[name].prefill.model_copy(update={"min_len": 7})
    assert changed.decode == PRESETS[config.DEFAULT_PRESET].decode


@pytest.mark.parametrize("start", [["--misa-preset", "fast"], ["--misa-preset", "dsa", "--misa-decode", "fast"], []])
@pytest.mark.parametrize("changed", [{"min_len": 2048}, {"min_rows": 1}, {"min_rows": 1, "min_len": 2048}])
def test_a_gate_given_in_part_is_not_held_back_by_a_presets(start, changed):
    words = [f"--misa-decode-{name.replace('_', '-')}={value}" for name, value in changed.items()]
    preset = PRESETS["fast" if start else config.DEFAULT_PRESET].decode
    assert from_flags(*start, *words).decode == preset.model_copy(update={**changed, "min_tokens": 0})
    whole = from_flags(*start, *words, "--misa-decode-min-tokens", "77").decode
    assert whole == preset.model_copy(update={**changed, "min_tokens": 77})
    assert from_flags(*start, "--misa-decode-candidates", "4096").decode.min_tokens == preset.min_tokens > 0


def test_a_gate_of_the_users_file_stays(tmp_path):
    path = tmp_path / "misa.json"
    for text, kept in ('{"decode": {"heads": 8, "min_tokens": 77}}', 77), ('{"decode": {"heads": 8}}', 0), ("fast", 0):
        path.write_text(text)
        chosen = from_flags("--misa-config", str(path), "--misa-decode-min-len", "9")
        assert (chosen.decode.min_len, chosen.decode.min_tokens) == (9, kept)


IMPOSSIBLE = {
    "more heads than the model": ({"heads": 65}, "heads: expected at most the model's 64 index heads, got 65"),
    "a residual of all heads": (
        {"heads": 64, "residual": True},
        "residual: expected fewer routed heads than the model",
    ),
    "fewer candidates than k": ({"heads": 8, "candidates": 1024}, "expected at least the model's index_topk = 2048"),
    "fewer kept tokens than k": ({"blocks": 8, "block_size": 64}, "8 × 64 = 512"),
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_policy_impossible_for_the_model_is_named(name, phase):
    policy, words = IMPOSSIBLE[name]
    settings = MisaConfig.from_mapping({phase: policy}, "here")
    settings.check()
    with pytest.raises(ConfigError) as caught:
        settings.check(index_heads=64, topk=2048)
    (problem,) = caught.value.problems
    assert problem.startswith(phase)
    assert words in problem


def test_all_mistakes_come_together():
    with pytest.raises(ConfigError) as caught:
        MisaConfig.from_mapping({"prefil": {}, "decode": {"blocks": 1}, "backend": "gpu"}, "here")
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--misa-prefill-heads", "eight"], "--misa-prefill-heads: expected a whole number or 'all', got 'eight'"),
        (["--misa-prefill-heads", "0"], "--misa-prefill-heads: expected a number greater than or equal to 1, got 0"),
        (["--misa-recall-floor", "2"], "--misa-recall-floor: expected a number less than or equal to 1, got 2"),
        (["--misa-recall-floor", "high"], "--misa-recall-floor: expected a number, got 'high'"),
        (["--misa-dump-layers", "0;1"], "--misa-dump-layers: expected whole numbers with commas or 'all', got '0;1'"),
        (["--misa-preset", "misa", "--misa-config", "x.json"], "drop one"),
        (["--misa-preset", "misa", "--misa-policy", "x.json"], "drop one"),
        (["--misa-policy", "missing.json"], "--misa-policy: expected a readable JSON file, got missing.json"),
        (["--misa-config", "missing.json"], "expected a readable JSON file, got missing.json"),
        (["--misa-prefill-blocks", "2", "--misa-prefill-candidates", "4096"], "expected at most blocks × block_size"),
    ],
)
def test_a_mistaken_flag_is_named(words, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        from_flags(*words)


def test_an_unknown_flag_gets_a_suggestion():
    with pytest.raises(ConfigError, match="--misa-prefil-heads, did you mean --misa-prefill-heads"):
        flags.reject_unknown_flags(["--model-path", "x", "--misa-prefil-heads=8"])
    for word in ("-misa-preset", "--MISA-PRESET", "--misa_preset", "\N{EN DASH}misa-preset", "\N{EM DASH}misa-preset"):
        with pytest.raises(ConfigError, match=f"{word}, did you mean --misa-preset"):
            flags.reject_unknown_flags([word, "fast"])
    flags.reject_unknown_flags(["--misa-prefill-heads=8", "--tp", "8", "--served-model-name", "misa-test"])


def test_words_of_earlier_releases_are_understood_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    old = MisaConfig.from_mapping({"prefill": {"heads": 8, "router": "abs"}, "backend": "triton"}, "here")
    assert (old.prefill.router, old.backend) == ("mean", "kernels")
    assert from_flags("--misa-prefill-router", "abs").prefill.router == "mean"
    assert "'abs' is called 'mean' now" in caplog.text


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_known_by_its_policies(name):
    assert config.preset_name(PRESETS[name].model_copy(update={"audit": Audit(rows=4)})) == name
    assert config.preset_name(MisaConfig(prefill=SelectionPolicy(heads=3))) is None


def test_policies_are_named_by_their_axes():
    assert [preset.prefill.name for preset in PRESETS.values()] == [
        "dsa",
        "misa",
        "misa-hier",
        "hisa",
        "misa",
        "misa-error-residual",
        "misa-error-residual-hier",
        "exact",
    ]
    assert PRESETS["fast"].decode.name == "misa-error-residual-sketch1"
    assert SelectionPolicy(heads=8, blocks=64, block_size=128).name == "misa+hisa"
