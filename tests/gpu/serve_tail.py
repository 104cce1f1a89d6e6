"""SGLang's server, returning the selections of a request's last rows only: all rows of a 128K prompt are 4 GB of JSON.

    SELECTION_TAIL=256 python tests/gpu/serve_tail.py <arguments of sglang.launch_server>

Spawned schedulers import this file again, so the change below holds in them too.
"""

import os
import runpy
from typing import Any

from sglang.srt.state_capturer.base import BaseTopkCapturer

TAIL = int(os.environ.get("SELECTION_TAIL", "256"))
get_whole = BaseTopkCapturer.get_topk


def get_tail(self: Any, req_pool_idx: int, seqlen: int, req_to_token_pool: Any, start_len: int = 0) -> Any:
    return get_whole(self, req_pool_idx, seqlen, req_to_token_pool, max(start_len, seqlen - 1 - TAIL))


BaseTopkCapturer.get_topk = get_tail

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
