"""No key in the log or in /server_info, however the bytes are cut."""

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_misa import key_mask
from sglang_misa.key_mask import Mask, MaskArguments

key_texts = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF, exclude_categories=("Z", "C")), min_size=4)
noise = st.binary(max_size=40)


@given(st.lists(key_texts, min_size=1, max_size=3), st.lists(noise), st.data())
def test_no_key_gets_through_however_the_bytes_are_cut(keys, parts, data):
    written = st.sampled_from([form for key in keys for form in (key, repr(key), json.dumps(key))])
    text = b"".join(part + data.draw(written).encode() for part in parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    mask, whole = Mask(keys), Mask(keys)
    chunks = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    masked = b"".join([*map(mask.feed, chunks), mask.end()])
    assert masked == whole.feed(text) + whole.end()
    assert not any(key.encode() in masked for key in keys)


@given(st.lists(noise))
def test_without_keys_every_byte_gets_through(chunks):
    mask = Mask(())
    assert b"".join([*map(mask.feed, chunks), mask.end()]) == b"".join(chunks)


def test_a_line_is_written_when_it_ends():
    mask = Mask(["secret"])
    assert mask.feed(b"api_key='sec") == b""
    assert mask.feed(b"ret'\nnext") == b"api_key='***'\n"
    assert mask.feed(b" 50%\r") == b"next 50%\r"


def test_keys_are_read_from_sglangs_words():
    words = ["--tp", "8", "--api-key", "one", "--admin-api-key=two", "--ssl-keyfile", "file"]
    assert key_mask.given(words) == ("one", "two")
    assert key_mask.given(["--api-key=", "--tp=8"]) == ()


@pytest.fixture
def answer():
    """The (headers, body) that MaskArguments lets through of an application's answer in chunks."""

    def ask(path, chunks, keys):
        async def app(scope, receive, send):
            headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(b"".join(chunks)))]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            for place, chunk in enumerate(chunks, 1):
                await send({"type": "http.response.body", "body": chunk, "more_body": place < len(chunks)})

        sent = []

        async def send(message):
            sent.append(message)

        asyncio.run(MaskArguments(app, keys)({"type": "http", "path": path}, None, send))
        assert [message["type"] for message in sent[:2]] == ["http.response.start", "http.response.body"]
        return dict(sent[0]["headers"]), b"".join(message["body"] for message in sent[1:])

    return ask


@pytest.mark.parametrize("path", ["/server_info", "/get_server_info", "/server_info/", "/root/server_info"])
def test_server_info_names_no_key(answer, path):
    headers, body = answer(path, [b'{"admin_api_key": "adm', b'in-key", "tp": 8}'], ["user-key", "admin-key"])
    assert json.loads(body) == {"admin_api_key": "***", "tp": 8}
    assert headers[b"content-length"] == str(len(body)).encode()


def test_other_answers_stay_as_they_are(answer):
    assert answer("/generate", [b"admin-key"], ["admin-key"])[1] == b"admin-key"
