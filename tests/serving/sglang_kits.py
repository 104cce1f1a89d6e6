"""SGLang's own test kits, out of its wheel, on servers with MISA, the canary on `raise`: `make kits` says what ran.

| kit | here |
|---|---|
| radix_cache_server_kit | runs, with forced retractions, over a smaller tree of prompts |
| abort_timeout_kit | runs: all aborted; time out in the queue, and while running in two waves |
| pause_generation_kit | runs |
| streaming_session_kit | runs: sessions whose prompts are refused for their length, again and again |
| basic_scheduler_stress_kit and others of answers | not: weights at random know no capital |
| cache_consistency_jitter | not: compares by bits, which needs deterministic inference, and holds up CUDA streams |
| kv_canary | not: SGLang's canary has no DSA pool |

Kits that cannot run are skipped only while the refusal that stops them is there.
"""

import dataclasses
import functools
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from sglang.test.kits import radix_cache_server_kit
from sglang.test.kits.abort_timeout_kit import AbortAllMixin, RunningTimeoutTwoWaveMixin, WaitingTimeoutMixin
from sglang.test.kits.pause_generation_kit import PauseResumeInPlaceMixin
from sglang.test.kits.streaming_session_kit import AbortLeakReproKitMixin
from sglang.test.server_fixtures import streaming_session_fixture
from transformers import AutoTokenizer

from sglang_misa import random_model
from sglang_misa.procs import free_port

pytestmark = pytest.mark.serving

WATCHED = "--misa-verify-stats raise --max-total-tokens 16384"
RETRACT = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "40"}
VOCAB = 32000  # the radix kit's tokens
CONTEXT = 8192  # of the folder's servers


class Kit(unittest.TestCase):
    """A kit's test case: base_url and process are what SGLang's mixins ask for. Its server's statistics stay right."""

    words: ClassVar[str] = f"{WATCHED} --max-running-requests 16"
    environ: ClassVar[dict[str, str]] = RETRACT
    base_url: str
    process: Any
    verified: Callable[[], dict[str, int]]

    @pytest.fixture(scope="class", autouse=True)
    def served(
        self, request: pytest.FixtureRequest, start: Any, wide: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[None]:
        kit = request.cls
        with start(kit.words, wide, tmp_path_factory.mktemp("kit") / "log", **kit.environ) as server:
            kit.base_url = f"http://127.0.0.1:{server.port}"
            kit.process = SimpleNamespace(poll=lambda: server.process.exit_code, log=server.process.log)
            kit.verified = staticmethod(lambda: server.misa()["page_stats_verified"])
            yield
            assert server.healthy()
            assert kit.verified()["mismatches"] == 0


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tests' model with a vocabulary as wide as the kits'."""
    return random_model.ensure(tmp_path_factory.mktemp("wide"), dataclasses.replace(random_model.CPU, vocab=VOCAB))


class TestRadixAbortPause(AbortAllMixin, PauseResumeInPlaceMixin, Kit):
    abort_all_num_requests, abort_all_max_new_tokens = 12, 2000
    pause_num_requests, pause_max_new_tokens, pause_duration = 12, 200, 2

    def test_radix(self) -> None:
        tree = functools.partial(radix_cache_server_kit.gen_radix_tree, num_nodes=60, chunk_len=100)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(radix_cache_server_kit, "gen_radix_tree", tree)
            radix_cache_server_kit.run_radix_attention_test(self.base_url)
        assert self.verified()["pages"] > 0
        assert "Testing retraction" in self.process.log.read_text(errors="replace")


class TestSessionAborts(AbortLeakReproKitMixin, Kit):
    words, environ = f"{Kit.words} --enable-streaming-session", {}

    @pytest.fixture(scope="class", autouse=True)
    def sized(self, request: pytest.FixtureRequest, wide: Path) -> Iterator[None]:
        """The kit's tokenizer, and its prompts that are too long, for the server's context."""
        request.cls.tokenizer = AutoTokenizer.from_pretrained(wide)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(streaming_session_fixture, "ABORT_REPRO_ABORT_TOKENS", CONTEXT + 100)
            yield


class TestWaitingTimeout(WaitingTimeoutMixin, Kit):
    words, environ = f"{WATCHED} --max-running-requests 1", {"SGLANG_REQ_WAITING_TIMEOUT": "1"}
    waiting_timeout_max_new_tokens = 100  # longer than that, and within the kit's minute


class TestRunningTimeout(RunningTimeoutTwoWaveMixin, Kit):
    environ: ClassVar = {"SGLANG_REQ_RUNNING_TIMEOUT": "5"}


def refused(begin: Any, model: Path, flags: str, why: str) -> None:
    """Skip with the words that stop a server of these flags; fail where none do."""
    words = f"--misa-preset dsa --misa-decode-blocks 4 --device cpu --port {free_port()} {flags} --model-path".split()
    ended = begin(*words, model)()
    assert ended.returncode != 0
    assert why in ended.stdout, ended.stdout[-2000:]
    pytest.skip(next(line for line in ended.stdout.splitlines() if why in line).strip())


def test_cache_consistency_jitter(begin: Any, model: Path) -> None:
    refused(begin, model, "--enable-deterministic-inference", "the order of the selected tokens varies")


def test_kv_canary(begin: Any, model: Path) -> None:
    refused(begin, model, "--kv-canary raise", "no attacher registered for pool class DSATokenToKVPool")
