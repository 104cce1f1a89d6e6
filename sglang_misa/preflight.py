"""Checks before a server starts: can the model be read, can kernels be compiled, can the code in caches be trusted."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

# Compiled code is kept and loaded here: (variable, its default), of tvm-ffi for CUDA kernels and of Triton.
CACHES = (("TVM_FFI_CACHE_DIR", "~/.cache/tvm-ffi"), ("TRITON_CACHE_DIR", "~/.triton/cache"))
CUDA = "/usr/local/cuda"  # where a toolkit is taken for granted that no variable and no path names
WEIGHTS, INDEX = ("*.safetensors", "*.bin", "*.pt", "*.gguf"), "model.safetensors.index.json"
NEEDED = 1 << 30  # bytes of a cache: all kernels of one version take less than half


def model_problems(folder: Path) -> Iterator[str]:
    """Reasons why this user cannot read the model in `folder`; none where it is no folder, or holds none."""
    try:
        files = [folder, *folder.glob("config.json"), *sorted(folder.glob("*.safetensors"))] if folder.is_dir() else []
    except PermissionError:  # of a folder above it
        files = [folder]
    except OSError:  # what can be no name
        files = []
    unreadable = [file for file in files if not os.access(file, os.R_OK | (os.X_OK if file == folder else 0))]
    if unreadable:
        dangling = [file for file in unreadable if os.path.islink(file)]
        advice = (
            "links out of a Hugging Face cache are lost in a container: copy the folder with cp -rL"
            if dangling
            else "chmod -R a+rX it"
        )
        yield (
            f"--model-path: expected files that uid {os.getuid()} can read, got {unreadable[0]} and "
            f"{len(unreadable) - 1} more without; {advice}"
        )


def weight_problems(folder: Path, *, needed: bool) -> Iterator[str]:
    """Reasons why the weights in `folder` are not whole; none at all is a reason where they are `needed`.

    Files are opened where safetensors is installed, as it is beside SGLang.
    """
    there = {file.name for pattern in WEIGHTS for file in folder.glob(pattern)}
    if not there:
        if needed:
            yield f"--model-path: expected weights ({', '.join(WEIGHTS)}) in {folder}, got none; finish the download"
        return
    if importlib.util.find_spec("safetensors") is not None:
        yield from filter(None, map(_cut_off, sorted(folder.glob("*.safetensors"))))
    try:
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        listed = {os.fspath(name) for name in weight_map.values()}
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        yield f"{folder / INDEX}: expected an index of weights, got another file ({error!r:.200}); download it again"
        return
    if lost := sorted(listed - there):
        yield (
            f"--model-path: expected the {len(listed)} files that {folder / INDEX} lists, got all but {len(lost)}, "
            f"without {lost[0]}; finish the download"
        )


def _cut_off(file: Path) -> str | None:
    """The sentence for a safetensors file that its own header does not cover; None for a whole one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"):
            return None
    except (SafetensorError, OSError) as error:
        return f"--model-path: expected a whole safetensors file, got {file} ({error}); download it again"


def compiler_problems(environ: Mapping[str, str]) -> Iterator[str]:
    """Reasons why tvm-ffi could not compile kernels here; it looks for its tools in the same places."""
    path = environ.get("PATH", os.defpath)
    for tool in ("ninja", (environ.get("CXX") or "c++").split()[0]):
        if shutil.which(tool, path=path) is None:
            yield (
                f"PATH: expected {tool} on it, which compiles kernels, got {path}; install it, or put the folder of "
                "the environment's programs on the path, as activating it does"
            )
    nvcc = shutil.which("nvcc", path=path)
    home = Path(environ.get("CUDA_HOME") or environ.get("CUDA_PATH") or (nvcc and Path(nvcc).parents[1]) or CUDA)
    if not os.access(home / "bin/nvcc", os.X_OK):
        yield f"CUDA_HOME: expected a CUDA toolkit with nvcc, which compiles kernels, got {home}; install or name one"


def cache_problems(environ: Mapping[str, str], needed: int = NEEDED) -> Iterator[str]:
    """Reasons not to compile kernels into, and load them from, the caches that `environ` names."""
    for variable, default in CACHES:
        folder = Path(os.path.expanduser(environ.get(variable) or default))
        there = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
        try:
            with tempfile.TemporaryFile(dir=there):
                mode = there.stat().st_mode
        except OSError as error:
            yield f"{variable}: expected a folder to write compiled kernels to, got {there} ({error}); set {variable}"
            continue
        # What we make ourselves is private. A fresh volume's root may be open to all, and not ours to close.
        if there == folder and mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            yield (
                f"{variable}: expected a folder that others cannot write, as code is loaded from it, got {there} with "
                f"mode {stat.S_IMODE(mode):o}; chmod o-w it, or set {variable}"
            )
        if os.statvfs(there).f_flag & os.ST_NOEXEC:
            yield f"{variable}: expected a folder whose code may run, got {there}, mounted noexec; set {variable}"
        if (free := shutil.disk_usage(there).free) < needed:
            yield (
                f"{variable}: expected {needed >> 20} MiB free for compiled kernels, got {free >> 20} in {there}; make "
                f"room, or set {variable}"
            )
