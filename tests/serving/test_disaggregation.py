"""Prefill on one server, decode on another: it selects by statistics of pages that the first one wrote.

Pages come by Mooncake over TCP, SGLang's own transfer that needs neither RDMA nor a GPU. Skipped without the package
mooncake-transfer-engine-non-cuda and its libibverbs.
"""

import random
from pathlib import Path
from typing import Any

import pytest

from sglang_misa.procs import free_port

pytestmark = pytest.mark.serving
pytest.importorskip(
    "mooncake.engine", reason="needs mooncake-transfer-engine-non-cuda and libibverbs", exc_type=ImportError
)

LENGTHS, NEW = (300, 700, 64), 70  # every request completes a page of its own
ENVIRON = {
    "MOONCAKE_PROTOCOL": "tcp",
    "OMP_NUM_THREADS": "1",
    "SGLANG_HOST_IP": "127.0.0.1",
    "SGLANG_LOCAL_IP_NIC": "lo",
}


def test_decode_selects_as_on_one_server(start: Any, server: Any, model: Path, tmp_path: Path, together: Any) -> None:
    port = free_port()
    words = f"--disaggregation-transfer-backend mooncake --disaggregation-bootstrap-port {port} --disaggregation-mode"
    numbers = random.Random(7)
    prompts = [[numbers.randrange(2, 300) for _ in range(length)] for length in LENGTHS]
    expected = [server.generate(prompt, NEW).ids for prompt in prompts]
    prefilling = start(f"{words} prefill --misa-decode-blocks all", model, tmp_path / "prefill", **ENVIRON)
    decoding = start(f"{words} decode --misa-verify-stats raise", model, tmp_path / "decode", **ENVIRON)
    with prefilling as prefill, decoding as decode:

        def ask(number: int) -> list[int]:
            where = {"bootstrap_host": "127.0.0.1", "bootstrap_port": port, "bootstrap_room": number}
            body = prefill.body(prompts[number - 1], NEW) | where
            return together(lambda one: one.json("/generate", body), [prefill, decode])[1]["output_ids"]

        alone = [ask(number) for number in range(1, 1 + len(prompts))]
        status = decode.misa()
    assert alone == expected
    assert status["calls"]["decode"]["hisa"] > 0
    assert status["page_stats_verified"]["pages"] > 0
    assert status["page_stats_verified"]["mismatches"] == 0
