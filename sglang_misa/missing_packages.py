"""What a program says where a package that it needs is not installed."""

from __future__ import annotations

import sys
from types import TracebackType

MISSING = 2  # exit status
BENCH_ALONE = ("sglang_misa.bench.load", "sglang_misa.bench.quality")  # programs that ask servers, and need no SGLang
PACKAGES = {  # that the extras bring, with what those depend on
    *("aiohttp", "matplotlib", "numpy", "prometheus_client", "requests", "rich", "scipy", "tyro"),
    *("safetensors", "sglang", "tokenizers", "torch", "triton", "tvm_ffi"),
}


def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """`sys.excepthook` of `python -m sglang_misa.…`: a sentence instead of a traceback for a missing package."""
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if package not in PACKAGES:
        sys.__excepthook__(kind, error, trace)
        return
    program = next((word for word in sys.orig_argv if word.startswith("sglang_misa")), "sglang_misa")
    extras = "bench" if program.startswith(BENCH_ALONE) and not program.endswith(".train") else "bench,sglang"
    print(
        f"{program}: expected the package {package}, got none; install the extras that it needs: "
        f'pip install "sglang-misa[{extras}]", or pip install ".[{extras}]" in a clone',
        file=sys.stderr,
    )
    raise SystemExit(MISSING)
