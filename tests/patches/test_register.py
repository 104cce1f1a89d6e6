"""Applying and undoing the register on the installed SGLang, and every reason not to."""

import dataclasses
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_misa.admission import AdmissionError
from sglang_misa.patches import register

VERSION = metadata.version("sglang")
ENTRIES = (register.LOAD_MODEL, *register.PATCHES)
PAGED = register.PATCHES[0]
ROOT = Path(__file__).parents[2]


def found(patch):
    """What lies in the class now."""
    owner, name = register._locate(patch.place(VERSION))
    return vars(owner)[name]


@pytest.fixture
def indexer(monkeypatch):
    """SGLang's Indexer, whose paged method is what it was before, whatever a test does to it."""
    from sglang.srt.layers.attention.dsa.dsa_indexer import Indexer

    monkeypatch.setattr(Indexer, "_get_topk_paged", Indexer._get_topk_paged)
    return Indexer


@pytest.fixture(autouse=True)
def clean():
    yield
    if register._applied:
        register.undo()


def test_apply_then_undo_leaves_the_identical_functions():
    before = {patch.target: found(patch) for patch in ENTRIES}
    register.apply(VERSION, ENTRIES)
    assert register.problems() == []
    for patch in ENTRIES:
        assert found(patch) is not before[patch.target]
        function = register._function(found(patch))
        assert function.__wrapped__ is register._function(before[patch.target])
        assert register.fingerprint(function) == patch.signature(VERSION)
    register.undo()
    assert {patch.target: found(patch) for patch in ENTRIES} == before
    assert len(register.problems()) == len(register.PATCHES)


def test_apply_twice_wraps_once():
    register.apply(VERSION)
    installed = found(PAGED)
    register.apply(VERSION)
    assert found(PAGED) is installed


@pytest.mark.parametrize("version", ["0.5.16", "0.5.18", "0.5.17.post1", "1.0"])
def test_an_unknown_version_is_refused(version):
    before = found(PAGED)
    with pytest.raises(AdmissionError, match=rf"0\.5\.17 \(CPU and GPU\).*got {version}; install sglang=="):
        register.apply(version)
    assert found(PAGED) is before


def test_a_changed_signature_is_refused_and_nothing_is_applied():
    drifted = dataclasses.replace(PAGED, signatures={"0.5.17": "self, forward_batch, logits"})
    others = register.PATCHES[1:]
    before = [found(patch) for patch in ENTRIES]
    with pytest.raises(AdmissionError) as caught:
        register.apply(VERSION, (*others, drifted))
    (problem,) = caught.value.problems
    assert "Indexer._get_topk_paged: expected the signature (self, forward_batch, logits)" in problem
    assert "got (self, forward_batch, layer_id, q_fp8, weights, metadata)" in problem
    assert [found(patch) for patch in ENTRIES] == before


def test_a_missing_target_is_refused():
    gone = dataclasses.replace(PAGED, target=PAGED.target + "_v2")
    with pytest.raises(AdmissionError, match="_get_topk_paged_v2: expected this function in SGLang"):
        register.apply(VERSION, (gone,))


def test_all_reasons_come_together():
    drifted = [dataclasses.replace(patch, signatures={"0.5.17": "self"}) for patch in register.PATCHES]
    with pytest.raises(AdmissionError) as caught:
        register.apply(VERSION, drifted)
    assert len(caught.value.problems) == len(register.PATCHES)


def test_a_hook_of_another_plugin_is_refused(indexer):
    from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

    def around(original, *args, **kwargs):
        return original(*args, **kwargs)

    target = PAGED.target.replace(":", ".")
    HookRegistry.register(target, around, HookType.AROUND, source=HookSource("profiler", "some-profiler"))
    try:
        HookRegistry.apply_hooks()
        with pytest.raises(AdmissionError) as caught:
            register.apply(VERSION)
    finally:
        del HookRegistry._hooks[target]
        HookRegistry._patched.discard(target)
    (problem,) = caught.value.problems
    assert "expected SGLang's own function, got a hook of plugin profiler" in problem
    assert "SGLANG_PLUGINS" in problem


def test_a_plain_replacement_is_refused(indexer):
    indexer._get_topk_paged = lambda self, forward_batch, layer_id, q_fp8, weights, metadata: None
    with pytest.raises(AdmissionError, match=r"expected SGLang's own function, got a function from .*test_register"):
        register.apply(VERSION)


def test_a_hook_put_over_ours_is_seen_and_survives_undo(indexer):
    original = indexer._get_topk_paged
    register.apply(VERSION)
    ours = indexer._get_topk_paged

    def sabotage(*args, **kwargs):
        return original(*args, **kwargs)

    indexer._get_topk_paged = sabotage
    (problem,) = register.problems()
    assert "Indexer._get_topk_paged: expected our hook outermost, got a function from" in problem
    with pytest.raises(AdmissionError):
        register.undo()
    assert indexer._get_topk_paged is sabotage
    functions = [register._function(found(patch)) for patch in register.PATCHES]
    assert not any(hasattr(function, "__wrapped__") for function in functions), "the others are back"
    indexer._get_topk_paged = ours
    register.undo()
    assert indexer._get_topk_paged is original


class Shapes:
    @classmethod
    def of_class(cls, x):
        return cls, x

    @staticmethod
    def of_nobody(x):
        return x


def doubled(original, *args):
    return original(*args), original(*args)


@pytest.mark.parametrize("name", ["of_class", "of_nobody"])
def test_class_and_static_methods_stay_what_they_are(name):
    text = "cls, x" if name == "of_class" else "x"
    patch = dataclasses.replace(
        PAGED, target=f"{__name__}:Shapes.{name}", wrapper=f"{__name__}:doubled", signatures={"0.5.17": text}
    )
    before, result = vars(Shapes)[name], getattr(Shapes(), name)(1)
    register.apply(VERSION, (patch,))
    assert getattr(Shapes, name)(1) == getattr(Shapes(), name)(1) == (result, result)
    register.undo()
    assert vars(Shapes)[name] is before


names = st.lists(st.sampled_from("abcdefgh"), min_size=8, max_size=8, unique=True)


@given(names, st.integers(0, 3), st.integers(0, 3), st.integers(0, 2), st.booleans(), st.booleans())
def test_a_fingerprint_is_the_parameter_list_itself(letters, only, plain, keyword, rest, extra):
    """What it writes, with a value for each default, compiles to a function with the same fingerprint."""
    words = letters[:only] + (["/"] if only else []) + letters[only : only + plain]
    words += (["*rest"] if rest else ["*"] if keyword else []) + [f"{n}=" for n in letters[6 : 6 + keyword]]
    words += ["**extra"] if extra else []
    text = ", ".join(words)
    assert register.fingerprint(eval(f"lambda {text.replace('=', '=None')}: None")) == text


@pytest.mark.parametrize("name", ["kernels", "patches", "bench", "tests"])
def test_a_top_level_folder_does_not_shadow_an_installed_package(tmp_path, name):
    """`python -m` and pytest put the root first on the path; Hugging Face's package is called `kernels`."""
    package = tmp_path / name / "__init__.py"
    package.parent.mkdir()
    package.touch()
    run = subprocess.run(
        [sys.executable, "-c", f"import {name}; print({name}.__file__)"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == str(package)


def test_a_replaced_class_is_refused(monkeypatch):
    from sglang.srt.layers.attention.dsa import dsa_indexer

    class Other(dsa_indexer.Indexer):
        def _get_topk_paged(self, forward_batch, layer_id, q_fp8, weights, metadata):
            return None

    monkeypatch.setattr(dsa_indexer, "Indexer", Other)
    with pytest.raises(AdmissionError) as caught:
        register.apply(VERSION)
    assert len(caught.value.problems) == 3, "each of the three functions hooked on Indexer"
