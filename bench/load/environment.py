"""Environment of a run: this client, what the servers report, the GPUs, and the command that repeats the run."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from sglang_misa import __version__
from sglang_misa.bench.commit import commit
from sglang_misa.bench.load.safety import Keys
from sglang_misa.bench.load.selection import ranks_of

SERVER_FACTS = (
    *("version", "model_path", "tp_size", "dp_size", "ep_size", "dtype", "kv_cache_dtype", "quantization", "page_size"),
    *("context_length", "max_total_num_tokens", "mem_fraction_static", "chunked_prefill_size", "max_running_requests"),
    *("attention_backend", "prefill_attention_backend", "decode_attention_backend", "speculative_algorithm"),
    *("disable_cuda_graph", "disable_radix_cache", "enable_mixed_chunk", "schedule_policy"),
)


class Environment(BaseModel):
    """What a stranger needs to repeat a run on the client's side."""

    model_config = ConfigDict(frozen=True)

    command: str
    started: str  # UTC
    client: dict[str, str]
    gpus: dict[str, str]

    @property
    def commit(self) -> str:
        """The commit that was run, or the version that is installed."""
        version, _, commit = self.client["sglang-misa"].partition(" ")
        return commit.strip("()") or version

    @classmethod
    def now(cls, arguments: Sequence[str], keys: Keys, module: str = "sglang_misa.bench.load") -> Environment:
        """As it is at this moment; keys are erased from the command."""
        words = ["python", "-m", module, *arguments]
        return cls(
            command=keys.erase(shlex.join(words)),
            started=f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}",
            client={
                "sglang-misa": __version__ + (f" ({at})" if (at := commit()) else ""),
                "Python": platform.python_version(),
                "system": platform.platform(),
                "CPU": f"{_cpu()}, {os.cpu_count()} cores",
                "load before": " ".join(f"{load:.1f}" for load in os.getloadavg()),
            },
            gpus=_gpus(),
        )


def facts(info: Mapping[str, Any]) -> dict[str, str]:
    """The settings in /server_info that a reader of figures asks for, and the token selection of the first rank."""
    found = {name: str(info[name]) for name in SERVER_FACTS if info.get(name) not in (None, "", False)}
    for rank in ranks_of(info)[:1]:
        found["selection"] = json.dumps(rank.get("policy", {})) if rank.get("enabled") else "stock"
    return Keys().clean(found)  # type: ignore[no-any-return]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or sys.platform
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpus() -> dict[str, str]:
    """Names of this machine's GPUs and their driver; empty without pynvml."""
    try:
        import pynvml

        pynvml.nvmlInit()
        names = [
            str(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(i)))
            for i in range(pynvml.nvmlDeviceGetCount())
        ]
        return {
            "GPUs": ", ".join(f"{names.count(n)} × {n}" for n in dict.fromkeys(names)),
            "driver": str(pynvml.nvmlSystemGetDriverVersion()),
        }
    except Exception:  # no package, no driver, no permission: there is nothing to say
        return {}
