"""SGLang's Scheduler: what /server_info tells about this package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_misa.metrics import recorder


def get_internal_state(original: Callable[..., Any], self: Any, recv_req: Any) -> Any:
    """Scheduler.get_internal_state: adds this rank's status as `misa`. Rank 0 of each data-parallel group answers."""
    output = original(self, recv_req)
    output.internal_state["misa"] = recorder.status()
    return output
