"""SGLang's server, returning the selections of a request's last rows only: all rows of a 128K prompt are 4 GB of JSON.

    SELECTION_TAIL=256 python tests/gpu/server/serve_tail.py <arguments of sglang.launch_server>

With SELECTION_DIGESTS every rank writes a line a finished request to a file of its own in that folder: a digest of the
same rows' sets for each layer. Spawned schedulers import this file again, so the changes below hold in them too.
"""

import hashlib
import os
import pathlib
import runpy
from types import SimpleNamespace
from typing import Any

from sglang.srt.state_capturer import indexer_topk
from sglang.srt.state_capturer.base import BaseTopkCapturer

TAIL = int(os.environ.get("SELECTION_TAIL", "256"))
DIGESTS = os.environ.get("SELECTION_DIGESTS")
get_whole = BaseTopkCapturer.get_topk


def get_tail(self: Any, req_pool_idx: int, seqlen: int, req_to_token_pool: Any, start_len: int = 0) -> Any:
    tail = get_whole(self, req_pool_idx, seqlen, req_to_token_pool, max(start_len, seqlen - 1 - TAIL))
    if DIGESTS is not None:
        layers = tail.sort(-1).values.unbind(1)
        words = [hashlib.sha256(layer.contiguous().numpy().tobytes()).hexdigest()[:16] for layer in layers]
        with (pathlib.Path(DIGESTS) / str(os.getpid())).open("a") as log:
            print(len(tail), *words, file=log)
    return tail


BaseTopkCapturer.get_topk = get_tail
# SGLang captures with one attention rank only. But every rank runs the whole indexer over all rows of its requests, so
# each can capture them; the first one's are returned.
indexer_topk.get_parallel = lambda: SimpleNamespace(attn_tp_size=1)

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
