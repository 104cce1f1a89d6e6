"""Each fault of the file system has its sentence, and a sound one has none."""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from sglang_misa import launch_server, preflight
from sglang_misa.procs import free_port

NOBODY = 65534


@pytest.fixture
def caches(tmp_path):
    """An environment whose two caches lie in `tmp_path`."""
    return {variable: str(tmp_path / variable.lower()) for variable, _ in preflight.CACHES}


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "a.safetensors", "b.safetensors"):
        (folder / name).write_text("{}")
    return folder


def test_weights_that_their_header_does_not_cover(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": np.zeros(1000, np.float32)}, file)
    assert list(preflight.weight_problems(tmp_path, needed=True)) == []
    for size in (1000, 3, 0):
        os.truncate(file, size)
        (problem,) = preflight.weight_problems(tmp_path, needed=True)
        assert f"expected a whole safetensors file, got {file}" in problem


def test_private_and_missing_folders_are_fine(caches, tmp_path):
    (tmp_path / "tvm_ffi_cache_dir").mkdir(mode=0o700)
    assert list(preflight.cache_problems(caches)) == []


def test_code_that_anybody_can_write_is_not_loaded(caches, tmp_path):
    (tmp_path / "triton_cache_dir").mkdir()
    (tmp_path / "triton_cache_dir").chmod(0o777)
    (problem,) = preflight.cache_problems(caches)
    assert problem.startswith("TRITON_CACHE_DIR: expected a folder that others cannot write")
    assert "mode 777" in problem


@pytest.mark.parametrize("mode", [0o1777, 0o777])
def test_a_folder_that_is_not_there_yet_is_fine_on_a_volume_open_to_all(caches, tmp_path, mode):
    tmp_path.chmod(mode)
    assert list(preflight.cache_problems(caches)) == []


def test_a_folder_that_cannot_be_written():
    problems = list(preflight.cache_problems(dict.fromkeys((name for name, _ in preflight.CACHES), "/proc/cache")))
    assert len(problems) == len(preflight.CACHES)
    assert "expected a folder to write compiled kernels to, got /proc" in problems[0]


def test_a_link_that_leads_nowhere_is_no_folder(caches, tmp_path):
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    (problem,) = preflight.cache_problems(caches | {"TVM_FFI_CACHE_DIR": str(tmp_path / "lost/cache")})
    assert problem.startswith(f"TVM_FFI_CACHE_DIR: expected a folder to write compiled kernels to, got {tmp_path}/lost")


def test_a_file_system_that_runs_no_code_keeps_no_kernels(caches, monkeypatch):
    disk = SimpleNamespace(f_flag=os.ST_NOEXEC, f_frsize=1, f_blocks=1 << 40, f_bfree=1 << 40, f_bavail=1 << 40)
    monkeypatch.setattr(os, "statvfs", lambda folder: disk)
    problems = list(preflight.cache_problems(caches))
    assert [problem.partition(":")[0] for problem in problems] == [variable for variable, _ in preflight.CACHES]
    assert all("mounted noexec" in problem for problem in problems)


def test_a_disk_that_is_full(caches):
    problems = list(preflight.cache_problems(caches, needed=1 << 60))
    assert len(problems) == len(preflight.CACHES)
    assert "MiB free for compiled kernels" in problems[0]


@pytest.fixture
def tools(tmp_path):
    """A PATH of one folder with every tool."""
    folder = tmp_path / "toolkit/bin"
    folder.mkdir(parents=True)
    for name in ("ninja", "c++", "nvcc"):
        (folder / name).touch(mode=0o755)
    return {"PATH": str(folder)}


@pytest.mark.parametrize("tool", ["ninja", "c++", "nvcc"])
def test_a_tool_that_compiling_lacks(tools, tmp_path, monkeypatch, tool):
    monkeypatch.setattr(preflight, "CUDA", str(tmp_path / "nowhere"))
    assert list(preflight.compiler_problems(tools)) == []
    (tmp_path / "toolkit/bin" / tool).unlink()
    (problem,) = preflight.compiler_problems(tools)
    assert problem.startswith("CUDA_HOME: expected a CUDA toolkit" if tool == "nvcc" else f"PATH: expected {tool} on")


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_the_toolkit_that_a_variable_names_is_the_one(tools, tmp_path, variable):
    assert list(preflight.compiler_problems(tools | {variable: str(tmp_path / "toolkit")})) == []
    (problem,) = preflight.compiler_problems(tools | {variable: str(tmp_path)})
    assert f"got {tmp_path};" in problem
    assert list(preflight.compiler_problems(tools | {"CXX": "ninja -O2"})) == []


def test_compilers_are_looked_for_where_there_is_a_gpu(model, caches, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    for variable, folder in caches.items():
        monkeypatch.setenv(variable, folder)
    for device, told in ((tmp_path, True), (tmp_path / "none", False)):
        monkeypatch.setattr(launch_server, "GPU_DEVICES", (str(device),))
        launch_server.main(["--check", "--misa-preset", "fast", "--model-path", "owner/model"])
        assert ("CUDA_HOME: expected" in capsys.readouterr().out) == told
        wanted = ["--misa-preset", "dsa", "--pp", "2", "--model-path", "owner/model"]
        assert launch_server.main([*wanted, "--port", str(free_port())]) == launch_server.REFUSED
        assert ("CUDA_HOME: expected" in capsys.readouterr().err) == told


def test_a_readable_model_is_fine(model, tmp_path):
    assert list(preflight.model_problems(model)) == []
    assert list(preflight.model_problems(tmp_path / "owner/model")) == []


def test_a_folder_without_a_model_is_not_this_check_s(tmp_path):
    assert list(preflight.model_problems(tmp_path)) == []


def test_links_that_lead_nowhere(model):
    (model / "c.safetensors").symlink_to("../../blobs/lost")
    (problem,) = preflight.model_problems(model)
    assert "c.safetensors and 0 more without" in problem
    assert "cp -rL" in problem


def test_a_launch_and_a_check_refuse_what_is_found_here(model, caches, tmp_path, monkeypatch, capsys):
    (tmp_path / "triton_cache_dir").mkdir()
    (tmp_path / "triton_cache_dir").chmod(0o777)
    for variable, folder in caches.items():
        monkeypatch.setenv(variable, folder)
    wanted = ["--misa-preset", "fast", "--model-path"]
    assert launch_server.main(["--check", *wanted, str(model)]) == launch_server.REFUSED
    assert "TRITON_CACHE_DIR: expected a folder that others cannot write" in capsys.readouterr().out
    assert launch_server.main([*wanted, "owner/model", "--port", str(free_port())]) == launch_server.REFUSED
    assert "TRITON_CACHE_DIR" in capsys.readouterr().err
    launch_server.main(["--check", *wanted, str(model), "--device", "cpu"])
    assert "TRITON_CACHE_DIR" not in capsys.readouterr().out  # nothing is compiled there
    (model / "c.safetensors").symlink_to("../../blobs/lost")
    assert launch_server.main([*wanted, str(model), "--port", str(free_port())]) == launch_server.REFUSED
    assert "copy the folder with cp -rL" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
@pytest.mark.parametrize("closed", ["", "a.safetensors"])
def test_a_model_of_another_user(model, tmp_path, closed):
    (model / closed).chmod(0o700)
    for folder in tmp_path.parents[:2]:
        folder.chmod(0o755)
    tmp_path.chmod(0o755)
    code = (
        f"import os; from pathlib import Path; from sglang_misa import preflight; os.setuid({NOBODY})\n"
        f"print(*preflight.model_problems(Path({str(model)!r})))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"expected files that uid {NOBODY} can read, got {model / closed}" in run.stdout
    assert "chmod -R a+rX" in run.stdout
