"""Streams on real sockets: the latency figures against the server's own clock, and every way a stream fails."""

from __future__ import annotations

import numpy as np
import pytest
from load.helpers import ask

from sglang_misa.bench.load import client

ERROR_S = 0.003  # stated error of a latency at the client's best; the machine may add more to some, never take away


@pytest.mark.parametrize("api", ["generate", "completions", "chat"])
def test_every_timestamp_agrees_with_the_server(mock, api):
    server = mock(ttft=0.05, itl=0.01)
    late_all, dispatch = [], []
    for _ in range(3):
        (reply,) = ask(server.url, api, count=10)
        assert reply.error is None, reply.detail
        ((arrived, *frames, done),) = server.sent().values()
        assert len(frames) == reply.counts[-1] == 10
        late = np.array(reply.times) - np.array([frames[count - 1] for count in reply.counts])  # of a read's last token
        assert (late > 0).all()
        late_all += late.tolist()
        dispatch.append(arrived - reply.dispatched)
        assert reply.done >= reply.times[-1]
        assert reply.done >= done
    assert min(late_all) < ERROR_S
    assert np.median(late_all) < 5 * ERROR_S  # a shared machine
    assert 0 < min(dispatch) < 5 * ERROR_S


@pytest.mark.parametrize("api", ["generate", "completions", "chat"])
def test_a_chunk_is_not_a_token(mock, api):
    """Chunks of 4 tokens (speculative decoding): the counts come from the usage, not from the number of chunks."""
    server = mock(chunk=4, itl=0.01)
    (reply,) = ask(server.url, api, count=10)
    assert set(reply.counts) <= {4, 8, 10}  # a busy machine reads two chunks at once
    assert reply.completion_tokens == 10
    assert reply.exact


def test_without_running_usage_the_total_is_spread_and_said_to_be(mock):
    server = mock(chunk=4, continuous=False)
    (reply,) = ask(server.url, "completions", count=12)
    assert reply.counts[-1] == 12
    assert not reply.exact


def test_the_role_is_no_token_and_reasoning_is(mock):
    """The role-only frame comes 0.1 s before the first token, and its usage claims one already."""
    server = mock(ttft=0.1, reasoning=3)
    (reply,) = ask(server.url, "chat", count=6)
    (sent,) = server.sent().values()
    assert reply.counts[-1] == reply.completion_tokens == 6
    assert reply.exact
    assert reply.times[0] > sent[1]
    assert reply.times[0] - reply.dispatched > 0.1
    assert len(reply.text) == 6  # reasoning and content


@pytest.mark.parametrize("incremental", [False, True])
def test_text_and_ids_are_whole_in_both_stream_styles(mock, incremental):
    server = mock(incremental=incremental, answer="añb→c😀")
    (reply,) = ask(server.url, count=12)
    assert reply.text == "añb→c😀añb→c😀"
    assert len(reply.output_ids) == 12


@pytest.mark.parametrize("cut", [1, 3, 7])
@pytest.mark.parametrize("api", ["generate", "chat"])
def test_frames_cut_anywhere(mock, api, cut):
    """Cuts inside UTF-8 characters, JSON strings and the blank line between events."""
    server = mock(cut=cut, answer="ñ→😀", itl=0.0)
    (reply,) = ask(server.url, api, count=6)
    assert reply.error is None, reply.detail
    assert reply.text == "ñ→😀ñ→😀"
    assert reply.counts == sorted(set(reply.counts))  # tokens of one read came at one time
    assert reply.counts[-1] == 6


def test_huge_chunks(mock):
    server = mock(pad=3_000_000, itl=0.0)
    (reply,) = ask(server.url, count=4)
    assert reply.error is None, reply.detail
    assert reply.received > 12_000_000
    assert reply.counts[-1] == 4


def test_an_event_without_end_is_refused(mock, monkeypatch):
    monkeypatch.setattr(client, "MAX_EVENT", 1_000_000)
    server = mock(pad=3_000_000)
    (reply,) = ask(server.url, count=2)
    assert reply.error == "oversized"


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("429", "http_429"),
        ("500", "http_500"),
        ("reset", "early_close"),
        ("early_close", "early_close"),
        ("error_event", "server_error"),
        ("bad_json", "bad_stream"),
    ],
)
def test_errors_have_classes(mock, fault, kind):
    server = mock(fault=fault)
    (reply,) = ask(server.url, count=6)
    assert reply.error in (kind, fault)
    assert reply.done is not None


def test_a_stall_is_told_from_a_timeout(mock):
    server = mock(fault="stall", itl=0.1)  # so that no read brings two tokens
    (reply,) = ask(server.url, count=6, stall=0.3)
    assert reply.error == "stall"
    assert len(reply.times) == 2
    server = mock(ttft=30.0)
    (reply,) = ask(server.url, count=6, bound=0.3, stall=20.0)
    assert reply.error == "timeout"


def test_nobody_listening():
    (reply,) = ask("http://127.0.0.1:1", count=1)
    assert reply.error == "refused"


def test_two_hundred_streams_at_once(mock):
    """No connector limit: all of them are in the server at the same time."""
    server = mock(ttft=1.5, itl=0.0)
    replies = ask(server.url, count=2, at_once=200)
    assert all(r.error is None for r in replies)
    arrived = [times[0] for times in server.sent().values()]
    first_token = min(r.times[0] for r in replies)
    assert len(arrived) == 200
    assert max(arrived) < first_token
