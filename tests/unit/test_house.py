"""The house's plan: imports point one way, no two modules need each other, and files stay small."""

import ast
import functools
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINKED = ("kernels", "patches", "bench")  # folders of the checkout that are linked into the package
PYTHON_LINES, CUDA_LINES = 400, 450
ARGUMENTS = 7
ON_PATCHES = ("sglang_misa.patches.", "sglang_misa.plugin", "sglang_misa.launch_server", "sglang_misa.bench.")
ON_SGLANG = (*ON_PATCHES, "sglang_misa.cpu")  # what starts SGLang, or is started by it
TOOLS = ("sglang_misa.bench", "sglang_misa.calibrate")  # run by hand, on top of everything else
ON_TOOLS = (*TOOLS, "sglang_misa.demo")  # which the launcher runs
KERNELS_NEED = {"torch", "triton", "tvm_ffi", *sys.stdlib_module_names}


def modules() -> dict[str, Path]:
    """Every module of the package and its file."""
    files = [file for folder in ("sglang_misa", *LINKED) for file in (ROOT / folder).rglob("*.py")]
    found = {}
    for file in files:
        parts = file.relative_to(ROOT).with_suffix("").parts
        parts = parts if parts[0] == "sglang_misa" else ("sglang_misa", *parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules()


@functools.cache
def imported(module: str) -> frozenset[str]:
    """Names of the modules that a module imports, at any depth; `from a import b` gives a.b where that is a module."""
    return frozenset(_imports(ast.parse(MODULES[module].read_text(encoding="utf-8"))))


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "the package imports by full names"
            base = node.module or ""
            inner = {f"{base}.{alias.name}" for alias in node.names} & MODULES.keys()
            yield from inner or {base}
            if len(inner) not in (0, len(node.names)):
                yield base


def importers(prefix: str) -> set[str]:
    """The modules that import something of this name or beneath it."""
    return {m for m in MODULES if any(name == prefix or name.startswith(f"{prefix}.") for name in imported(m))}


def test_kernels_need_torch_and_triton_alone() -> None:
    for module in MODULES:
        if module.startswith("sglang_misa.kernels."):
            foreign = {name for name in imported(module) if not name.startswith("sglang_misa.kernels.")}
            assert {name.partition(".")[0] for name in foreign} <= KERNELS_NEED, module


def test_sglang_is_imported_where_it_is_met() -> None:
    assert {m for m in importers("sglang") if not m.startswith(ON_SGLANG)} == set()


def test_nothing_below_imports_patches_or_tools() -> None:
    assert {m for m in importers("sglang_misa.patches") if not m.startswith(ON_PATCHES)} == set()
    assert {m for tool in TOOLS for m in importers(tool) if not m.startswith(ON_TOOLS)} == set()


def test_no_two_modules_need_each_other() -> None:
    graph = {module: {name for name in imported(module) if name in MODULES and name != module} for module in MODULES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_what_belongs_together_comes_together() -> None:
    """No function of the kernels and their faces takes more than seven arguments, programs of the GPU apart."""
    many = {}
    for module in MODULES:
        if not module.startswith(("sglang_misa.kernels.", "sglang_misa.ops", "sglang_misa.reference_ops")):
            continue
        for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and not any("jit" in ast.unparse(d) for d in node.decorator_list):
                arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                if len([name for name in arguments if name != "self"]) > ARGUMENTS:
                    many[f"{module}.{node.name}"] = arguments
    assert many == {}


def test_files_are_small() -> None:
    folders = ("sglang_misa", *LINKED, "tests", "examples")
    files = {file for folder in folders for file in (ROOT / folder).rglob("*") if file.is_file()}
    long = {}
    for file in sorted(files):
        most = {".py": PYTHON_LINES, ".cu": CUDA_LINES, ".cuh": CUDA_LINES}.get(file.suffix)
        name = str(file.relative_to(ROOT))
        if most is not None and (lines := len(file.read_text(encoding="utf-8").splitlines())) > most:
            long[name] = lines
    assert long == {}
