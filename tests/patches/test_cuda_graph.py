"""The two variants of a decode graph, on SGLang's own backend; CUDA's graphs, which need a GPU, have a stand-in."""

import contextlib
from array import array
from types import SimpleNamespace

import pytest
import torch
from batches import TOPK, Batch, selector
from recorders import fresh_recorder
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.runner.shape_key import ShapeKey
from sglang.srt.model_executor.runner_backend.full_cuda_graph_backend import FullCudaGraphBackend
from sglang.srt.runtime_context import get_parallel
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.eagle_info import EagleDraftExtendInput, EagleVerifyInput

from sglang_misa import decode_gate, runtime, versions
from sglang_misa.config import MisaConfig, SelectionPolicy
from sglang_misa.patches import cuda_graph, forward_batch, indexer, register

MIN_LEN = 1000
POLICY = SelectionPolicy(blocks=4, block_size=64, min_len=MIN_LEN)
KEYS = [ShapeKey(size=8), ShapeKey(size=1), ShapeKey(size=8, variant_label="lora")]


class Graph:
    """Counts its replays."""

    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1


class OnGpu(torch.Tensor):
    """Says so, and is not."""

    is_cuda = True


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(forward_batch, "_step", None)
    return fresh_recorder(monkeypatch, cuda_graph, forward_batch, indexer)


@pytest.fixture
def backend(monkeypatch, recorder):
    """SGLang's backend with our hooks, and CUDA's own part replaced."""
    register.apply(versions.installed())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    arm(monkeypatch, POLICY)
    device = SimpleNamespace(synchronize=lambda: None, graph=lambda **_: recording(monkeypatch))
    tp_group = SimpleNamespace(barrier=lambda: None)  # 0.5.17 takes it from the model runner
    runner = SimpleNamespace(device_module=device, model_runner=SimpleNamespace(tp_group=tp_group))
    with get_parallel().override(tp_group=tp_group):
        yield FullCudaGraphBackend(runner)
    register.undo()


@contextlib.contextmanager
def recording(monkeypatch):
    """The part of a capture that a graph records."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        yield


def arm(monkeypatch, decode):
    armed = runtime.Runtime(MisaConfig(decode=decode), 64, 2048, 8192, "cuda", 0, 1)
    monkeypatch.setattr(runtime, "_runtime", armed)


def step():
    """A decode forward: what its selection is made by."""
    return "policy" if decode_gate.why_stock(POLICY, None) is None else "stock"


def batch(*lengths, mode=ForwardMode.DECODE, width=1):
    inputs = {
        ForwardMode.TARGET_VERIFY: EagleVerifyInput.create_idle_input(1, width, width, "cpu"),
        ForwardMode.DRAFT_EXTEND_V2: EagleDraftExtendInput(num_tokens_per_req=width),
    }
    cpu = torch.tensor(lengths, dtype=torch.int64)
    return SimpleNamespace(seq_lens_cpu=cpu, forward_mode=mode, spec_info=inputs.get(mode))


def made(result, requests=()):
    """`result` as SGLang would make a batch of it."""
    schedule, runner = SimpleNamespace(reqs=requests), SimpleNamespace(token_to_kv_pool=None)
    return forward_batch.init_new(lambda *_: result, None, schedule, runner)


def test_each_shape_has_both_graphs_and_the_longest_request_chooses(backend, recorder):
    for key in KEYS:
        backend.capture_one(key, step)
    assert len(backend._graphs) == 2 * len(KEYS)
    for key in KEYS:
        assert backend.can_run(None, key)
        for lengths, expected in (
            ((5, MIN_LEN), "stock"),
            ((5, MIN_LEN + 1), "policy"),
            ((), "stock"),  # an idle data-parallel rank
        ):
            assert backend.replay(key, batch(*lengths)) == expected
        assert backend.replay(key, SimpleNamespace(seq_lens_cpu=None)) == "policy"
    assert [graph.replays for graph in backend._graphs.values()] == [2, 2] * len(KEYS)
    assert recorder.status()["replays"] == {"dsa": 6, "hisa": 3, "hisa:unknown-length": 3}


@pytest.mark.parametrize(
    ("lengths", "ran", "declined"), [((500, 90, 300), "hisa", {}), ((80, 90, 30), "dsa", {"under-min-len": 1})]
)
def test_a_capture_counts_once_and_its_warm_ups_not_at_all(
    backend, recorder, monkeypatch, poisoned_empty, lengths, ran, declined
):
    """The indexer's own hook, in SGLang's capture of both variants and then in a step without a graph."""
    policy = POLICY.model_copy(update={"min_len": 100})
    arm(monkeypatch, policy)
    requests = Batch(7, [*lengths], width=9)
    pool = SimpleNamespace(
        misa_selector=selector(requests, decode=policy),
        start_layer=0,
        get_index_k_with_scale_buffer=lambda layer_id: requests.index_k_pages,
    )
    monkeypatch.setattr(indexer.dsa_indexer, "get_token_to_kv_pool", lambda: pool)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    metadata = SimpleNamespace(
        get_seqlens_int32=lambda: torch.tensor(lengths, dtype=torch.int32),
        get_dsa_extend_len_cpu=lambda: [1] * len(lengths),
        get_page_table_64=lambda: requests.table,
        force_unfused_topk=False,
    )
    q_fp8, gates = requests.queries(len(lengths) + 1)  # and a row of padding
    arguments = 0, q_fp8.as_subclass(OnGpu), gates[..., None], metadata

    def forward():
        own = SimpleNamespace(index_topk=TOPK, misa_last=False)
        return indexer.get_topk_paged(lambda *_: None, own, made(batch(*lengths)), *arguments)

    backend.capture_one(KEYS[0], forward)
    assert recorder.status()["calls"]["decode"] == {"captured:hisa": 1, "captured:dsa": 1}
    assert recorder.status()["declined"]["decode"] == {}
    ids = forward()
    assert recorder.status()["calls"]["decode"] == {"captured:hisa": 1, "captured:dsa": 1, ran: 1}
    assert recorder.status()["declined"]["decode"] == declined
    if ran == "hisa":
        assert (ids[:-1] >= -1).all(), "a call writes all ids of its rows"
        assert (ids[-1] == -1).all(), "padding"


def test_without_lengths_on_the_host_the_tokens_of_its_requests_count(backend, recorder):
    """Speculative decoding under the overlap scheduler, on SGLang's own requests."""
    backend.capture_one(KEYS[0], step)
    request = Req("r", "", array("q", range(MIN_LEN - 1)), SamplingParams())
    for token, expected in ((1, "stock"), (2, "policy")):
        request.output_ids.append(token)
        forward = made(SimpleNamespace(seq_lens_cpu=None, forward_mode=ForwardMode.DECODE), [request])
        assert backend.replay(KEYS[0], forward) == expected
        for other in (SimpleNamespace(seq_lens_cpu=None), EagleDraftExtendInput(seq_lens_cpu=torch.zeros(1))):
            assert backend.replay(KEYS[0], other) == expected, "not by the batch made last"


GATED = POLICY.model_copy(update={"min_rows": 3, "min_tokens": 2 * MIN_LEN})


@pytest.mark.parametrize(
    ("lengths", "mode", "expected"),
    [
        ((MIN_LEN, MIN_LEN, MIN_LEN), ForwardMode.DECODE, "stock"),
        ((4 * MIN_LEN, MIN_LEN - 6, 5), ForwardMode.DECODE, "stock"),  # what short rows lack counts
        ((4 * MIN_LEN, MIN_LEN - 5, 5), ForwardMode.DECODE, "policy"),
        ((3 * MIN_LEN, 3 * MIN_LEN), ForwardMode.DECODE, "stock"),  # two rows, whatever the shape is
        ((MIN_LEN + 500,), ForwardMode.TARGET_VERIFY, "policy"),  # each verified token is a row that sees all
        ((MIN_LEN + 499,), ForwardMode.TARGET_VERIFY, "stock"),
        ((MIN_LEN + 500, *[1] * 7), ForwardMode.TARGET_VERIFY, "policy"),  # padded
        ((MIN_LEN + 500,), ForwardMode.DRAFT_EXTEND_V2, "policy"),
        ((MIN_LEN + 499,), ForwardMode.DRAFT_EXTEND_V2, "stock"),
    ],
)
@pytest.mark.parametrize("remade", [False, True])
def test_rows_and_tokens_choose_the_graph(backend, recorder, monkeypatch, lengths, mode, expected, remade):
    arm(monkeypatch, GATED)
    backend.capture_one(KEYS[0], step)
    forward = batch(*lengths, mode=mode, width=1 if mode == ForwardMode.DECODE else 4)
    assert backend.replay(KEYS[0], made(forward) if remade else forward) == expected


@pytest.mark.parametrize("mode", [ForwardMode.DECODE, ForwardMode.TARGET_VERIFY, ForwardMode.EXTEND])
def test_steps_over_their_phases_gate_are_told(recorder, monkeypatch, mode):
    config = MisaConfig(prefill=POLICY.model_copy(update={"min_len": 2999}), decode=GATED)
    armed = runtime.Runtime(config, 64, 2048, 8192, "cuda", 0, 1)
    monkeypatch.setattr(runtime, "_runtime", armed)
    recorder.armed(config, 0, 1, sglang="0.5.23", verified=True)
    for length in (2048, 2999, 3000):
        made(batch(length, MIN_LEN, MIN_LEN, mode=mode), [SimpleNamespace(seqlen=length)])
    phase = "prefill" if mode == ForwardMode.EXTEND else "decode"
    assert recorder.status()["steps_over_gate"] == {"prefill": 0, "decode": 0} | {phase: 1}
    arm(monkeypatch, SelectionPolicy())
    made(batch(1 << 20, 5, 5, mode=mode), [SimpleNamespace(seqlen=1 << 20)])
    assert recorder.status()["steps_over_gate"][phase] == 1, "a phase that is stock DSA's is not waited for"


def test_a_shape_that_is_always_under_the_gate_has_stocks_graph_alone(backend, recorder):
    backend.capture_one(KEYS[0], lambda: decode_gate.why_stock(POLICY, None, always="few-rows"))
    assert list(backend._graphs) == [KEYS[0]]
    assert backend.replay(KEYS[0], batch(MIN_LEN + 1)) == "few-rows"


def test_a_graph_without_decode_rows_stays_single(backend, recorder):
    backend.capture_one(KEYS[0], lambda: "prefill")
    assert list(backend._graphs) == [KEYS[0]]
    assert backend.replay(KEYS[0], batch(5)) == "prefill"
    assert recorder.status()["replays"] == {}


def test_without_a_gate_there_is_nothing_to_choose(backend, monkeypatch):
    arm(monkeypatch, POLICY.model_copy(update={"min_len": 0}))
    backend.capture_one(KEYS[0], step)
    assert list(backend._graphs) == [KEYS[0]]
    assert backend.replay(KEYS[0], batch(5)) == "policy"


def test_a_gate_of_tokens_alone_is_a_gate(backend, monkeypatch):
    arm(monkeypatch, POLICY.model_copy(update={"min_len": 0, "min_tokens": 10}))
    backend.capture_one(KEYS[0], step)
    assert [backend.replay(KEYS[0], batch(*lengths)) for lengths in ((5, 4), (5, 5))] == ["stock", "policy"]


def test_a_gate_of_rows_alone_is_a_gate(backend, monkeypatch):
    """A graph of many rows is padded with rows that are no request's."""
    arm(monkeypatch, POLICY.model_copy(update={"min_len": 0, "min_rows": 3}))
    backend.capture_one(KEYS[0], step)
    assert [backend.replay(KEYS[0], batch(*lengths)) for lengths in ((5, 4), (5, 5, 5))] == ["stock", "policy"]


def test_a_failed_capture_leaves_the_gate_open(backend):
    def broken():
        step()
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        backend.capture_one(KEYS[0], broken)
    assert decode_gate.why_stock(POLICY, decode_gate.Step([MIN_LEN])) == "under-min-len"
    assert decode_gate.why_stock(POLICY, decode_gate.Step([MIN_LEN + 1])) is None
