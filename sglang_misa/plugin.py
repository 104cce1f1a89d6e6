"""SGLang's entry point: off without SGLANG_MISA_CONFIG, and otherwise armed in every rank or no server at all.

SGLang's loader logs and drops every Exception of a plugin, so mistakes leave `load` as SystemExit, and everything that
needs the model happens inside the hook on ModelRunner.load_model (`patches/model_runner.py`), which may raise.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

from sglang_misa import admission
from sglang_misa.config import ConfigError, MisaConfig


@dataclass(frozen=True)
class Runtime:
    """What the hooks of this process select with."""

    config: MisaConfig
    index_heads: int  # H
    topk: int  # k
    device: str
    rank: int
    ranks: int

    @property
    def kernels(self) -> bool:
        """Whether the GPU kernels select, not the PyTorch reference."""
        return self.device == "cuda" and self.config.backend != "torch"


_runtime: Runtime | None = None


def load() -> None:
    """Entry point `sglang.srt.plugins: misa`, called in every process of the server before it reads its arguments.

    Raises SystemExit with every reason: a bad SGLANG_MISA_CONFIG, an unverified SGLang, a hook that does not fit.
    """
    try:
        if MisaConfig.from_env() is None:
            return
        admission.check_version(sglang_version())

        from sglang_misa.patches import register

        register.apply(sglang_version(), (register.LOAD_MODEL,))
    except (ConfigError, admission.AdmissionError) as error:
        raise SystemExit(str(error)) from None
    except Exception as error:
        raise SystemExit(
            f"sglang-misa stops the launch: expected its hook to install, got {error!r}; reinstall sglang-misa"
        ) from error


def sglang_version() -> str:
    return metadata.version("sglang")


def arm(runtime: Runtime) -> None:
    """Make `runtime` the one that the hooks read. Twice with the same values is fine; AdmissionError with others."""
    global _runtime
    if _runtime not in (None, runtime):
        raise admission.AdmissionError(
            [f"expected one runtime a process, {_runtime}, got {runtime}; start another server"]
        )
    _runtime = runtime


def runtime() -> Runtime:
    """What the hooks select with. Raises AdmissionError before `arm`."""
    if _runtime is None:
        raise admission.AdmissionError(["expected an armed process, got a hook called before ModelRunner.load_model"])
    return _runtime


def is_armed() -> bool:
    return _runtime is not None
