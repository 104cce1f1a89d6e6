"""Each register entry against the source of every SGLang version it names, taken from the wheel and not imported."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sglang_misa import versions
from sglang_misa.patches import register

ENTRIES = (register.LOAD_MODEL, *register.PATCHES)


@pytest.fixture(scope="session")
def wheel(pytestconfig):
    """The wheel of an SGLang version, fetched once into pytest's cache folder."""
    folder = Path(pytestconfig.cache.mkdir("sglang-wheels"))

    def fetch(version: str) -> zipfile.ZipFile:
        pattern = f"sglang-{version}-*.whl"
        if not list(folder.glob(pattern)):
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--no-deps",
                "--dest",
                str(folder),
                f"sglang=={version}",
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                pytest.fail(
                    f"expected to download the wheel of sglang=={version}, got exit code {done.returncode}; check the "
                    f"network or deselect with -m 'not download'\n{done.stderr[-2000:]}"
                )
        return zipfile.ZipFile(next(folder.glob(pattern)))

    return fetch


def function_in(wheel: zipfile.ZipFile, target: str) -> ast.FunctionDef:
    """The definition of `target` ("module:Class.function") in the sources of `wheel`."""
    module, path = target.split(":")
    class_name, function_name = path.split(".")
    source = wheel.read(module.replace(".", "/") + ".py")
    (owner,) = (n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == class_name)
    (function,) = (n for n in owner.body if isinstance(n, ast.FunctionDef) and n.name == function_name)
    return function


def fingerprint_of(function: ast.FunctionDef) -> str:
    """`register.fingerprint` of a definition: a lambda with its parameters, without annotations and values."""
    arguments = function.args
    for node in ast.walk(arguments):
        if isinstance(node, ast.arg):
            node.annotation = None
    arguments.defaults = [ast.Constant(None)] * len(arguments.defaults)
    arguments.kw_defaults = [d and ast.Constant(None) for d in arguments.kw_defaults]
    bare = ast.Expression(ast.Lambda(arguments, ast.Constant(None)))
    return register.fingerprint(eval(compile(ast.fix_missing_locations(bare), "<signature>", "eval")))


@pytest.mark.download
@pytest.mark.parametrize("version", versions.SUPPORTED)
@pytest.mark.parametrize("patch", ENTRIES, ids=lambda patch: patch.target.split(":")[1])
def test_the_target_is_there_with_the_registered_signature(wheel, patch, version):
    function = function_in(wheel(version), patch.place(version))
    assert fingerprint_of(function) == patch.signature(version)
    decorators = {ast.unparse(decorator) for decorator in function.decorator_list}
    assert decorators <= {"classmethod", "staticmethod"}, "another decorator would look like a foreign hook"


@pytest.mark.download
def test_the_check_sees_a_change(wheel):
    """The targets whose signature changed between two versions differ between the two sides of the change."""
    changed = [patch for patch in ENTRIES if len(patch.signatures) > 1]
    assert {patch.target.split(":")[1] for patch in changed} == {
        "DSATokenToKVPool.__init__",
        "DSATokenToKVPool.load_cpu_copy",
        "DSAIndexerPoolHost.load_to_device_per_layer",
        "ForwardBatch.init_new",
    }
    for patch in changed:
        assert fingerprint_of(function_in(wheel("0.5.17"), patch.place("0.5.17"))) != patch.signature("0.5.22")
