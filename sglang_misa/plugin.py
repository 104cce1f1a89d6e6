"""SGLang's entry point: off without SGLANG_MISA_CONFIG, and otherwise armed in every rank or no server at all.

SGLang's loader logs and drops every Exception of a plugin, so mistakes leave `load` as SystemExit, and everything that
needs the model happens inside the hook on ModelRunner.load_model (`patches/model_runner.py`), which may raise.
"""

from __future__ import annotations

from sglang_misa import admission, versions
from sglang_misa.config import ConfigError, MisaConfig


def load() -> None:
    """Entry point `sglang.srt.plugins: misa`, called in every process of the server before it reads its arguments.

    Raises SystemExit with every reason: a bad SGLANG_MISA_CONFIG, an unverified SGLang, a hook that does not fit.
    """
    try:
        if MisaConfig.from_env() is None:
            return
        admission.check_version(versions.installed())

        from sglang_misa.patches import register

        register.apply(versions.installed(), (register.LOAD_MODEL,))
    except (ConfigError, admission.AdmissionError) as error:
        raise SystemExit(str(error)) from None
    except Exception as error:
        raise SystemExit(
            f"sglang-misa stops the launch: expected its hook to install, got {error!r}; reinstall sglang-misa"
        ) from error
