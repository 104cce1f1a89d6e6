"""Dumps of index tensors: what an independent reader finds in them, and what becomes of a folder that fails."""

import json
import os
import struct
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from batches import TOPK, Batch

from sglang_misa import dump_folder
from sglang_misa.admission import AdmissionError
from sglang_misa.call import Span
from sglang_misa.config import ConfigError, Dump, MisaConfig
from sglang_misa.dump import FolderDump
from sglang_misa.kernels.layout import PAGE
from sglang_misa.metrics import recorder
from sglang_misa.policy_file import ModelIdentity

MODEL = ModelIdentity(architecture="X", layers=2, index_heads=32, index_topk=TOPK, config_sha256="0" * 64)
LENS, ROWS = [300, 130], [200, 130]


@pytest.fixture
def call():
    """An extend call in which the prompts of two requests end."""
    batch = Batch(3, LENS, 8)
    extend = batch.extend(ROWS, batch.queries(sum(ROWS)))
    ended = tuple(replace(span, left=0) for span in extend.spans)
    return replace(extend, spans=ended, index_k=extend.index_k.to(torch.float8_e4m3fn))


@pytest.fixture
def dump(tmp_path):
    return FolderDump(tmp_path / "d", Dump(folder=str(tmp_path / "d"), rows=5), MODEL, rank=0, layers=(0, 1))


@pytest.fixture(autouse=True)
def counts(monkeypatch):
    monkeypatch.setattr(recorder, "dump", type(recorder.dump)())
    return recorder.dump


def take(dump, call, layers=(0, 1)):
    for layer in layers:
        dump.take(replace(call, layer=layer))


def read(path):
    """A safetensors file by its specification alone: bytes of each tensor, its dtype and shape, and the metadata."""
    raw = path.read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:start])
    facts = header.pop("__metadata__")
    parts = {name: raw[start + t["data_offsets"][0] : start + t["data_offsets"][1]] for name, t in header.items()}
    return parts, {name: (t["dtype"], t["shape"]) for name, t in header.items()}, facts


def test_an_independent_reader_finds_the_prompts_tensors(dump, call, tmp_path):
    take(dump, call)
    names = sorted(file.name for file in (tmp_path / "d").glob("*.safetensors"))
    assert names == [f"prompt-0000{n}-layer-00{layer}-rank-0.safetensors" for n in (0, 1) for layer in (0, 1)]
    for number, (span, length) in enumerate(zip(call.spans, LENS, strict=True)):
        parts, shapes, facts = read(tmp_path / "d" / f"prompt-0000{number}-layer-001-rank-0.safetensors")
        assert (facts["layer"], facts["prompt"], json.loads(facts["model"])) == ("1", str(number), MODEL.model_dump())
        assert shapes["index_q"] == ("F8_E4M3", [5, 32, 128])
        positions = np.frombuffer(parts["positions"], np.int32)
        assert positions[-1] == length - 1
        assert (positions >= TOPK).all()
        rows = torch.from_numpy(positions - length + span.last_row)
        keys = slice(span.first_key, span.first_key + length)
        for name, wanted in {
            "index_q": call.index_q.view(torch.uint8)[rows],
            "head_gates": call.head_gates[rows],
            "index_k": call.index_k[keys].view(torch.uint8),
            "k_scale": call.k_scale[keys],
        }.items():
            assert parts[name] == wanted.contiguous().numpy().tobytes(), name


def test_folder_and_files_are_their_owners_alone(dump, call, tmp_path):
    take(dump, call)
    modes = {file.stat().st_mode & 0o077 for file in [tmp_path / "d", *(tmp_path / "d").glob("*.safetensors")]}
    assert modes == {0}


def test_two_servers_never_share_a_folder(dump, tmp_path):
    with pytest.raises(AdmissionError, match="no other server writes to"):
        FolderDump(tmp_path / "d", Dump(), MODEL, rank=0, layers=(0,))
    (problem,) = dump_folder.holders(Dump(folder=str(tmp_path / "d")))  # as a launch is told
    assert "no other server writes to" in problem
    assert list(dump_folder.holders(Dump(folder=str(tmp_path / "e")))) == list(dump_folder.holders(Dump())) == []
    FolderDump(tmp_path / "d", Dump(), MODEL, rank=1, layers=(0,))


@pytest.mark.parametrize("wrong", [{"folder": "x\0y"}, {"layers": []}, {"folder": ""}])
def test_settings_that_no_dump_can_have(wrong):
    with pytest.raises(ConfigError, match="dump"):
        MisaConfig.from_mapping({"dump": {"folder": "d"} | wrong}, "here")


def test_a_disk_that_fails_ends_the_dump_and_not_the_server(dump, call, tmp_path, monkeypatch, counts, caplog):
    take(dump, call)
    take(dump, call, (0,))
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    take(dump, call, (1, 0))
    assert not dump.wants(0, call.spans)
    assert {file.name[:12] for file in (tmp_path / "d").iterdir()} == {".rank-0.lock", "prompt-00000", "prompt-00001"}
    assert counts == {"prompts": 2, "left_out": 2, "stopped": 1}
    assert "No space left on device" in caplog.text


def test_a_disk_on_which_nothing_can_be_removed_either_does_not_end_the_server(dump, call, monkeypatch, counts):
    def fail(*_, **__):
        raise OSError(30, "Read-only file system")

    take(dump, call, (0,))
    monkeypatch.setattr(os, "open", fail)
    monkeypatch.setattr(os, "unlink", fail)
    monkeypatch.setattr(type(dump.folder), "unlink", fail)
    take(dump, call, (1,))
    assert counts == {"prompts": 0, "left_out": 2, "stopped": 1}


def test_what_a_killed_server_left_unfinished_is_removed_and_hinders_no_dump(dump, call, tmp_path):
    ours = tmp_path / "d" / f".prompt-00000-layer-000-rank-1.safetensors.{os.getpid()}"
    other = tmp_path / "d" / ".prompt-00000-layer-000-rank-0.safetensors.77"
    for file in (ours, other):
        file.write_bytes(b"half of it")
    after = FolderDump(tmp_path / "d", Dump(folder=str(tmp_path / "d")), MODEL, rank=1, layers=(0, 1))
    assert not ours.exists()
    assert other.exists(), "another rank's, which may be writing it"
    take(after, call)
    assert len(list((tmp_path / "d").glob("*-rank-1.safetensors"))) == 4


@pytest.fixture
def bad_names(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "to nothing").symlink_to(tmp_path / "nowhere" / "d")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("x" * 256, "File name too long"),
        ("ü" * 130, "File name too long"),
        ("a/" + "x" * 256 + "/b", "File name too long"),
        ("to nothing", "got a file or a link to nothing"),
        ("to nothing/d", "got a file or a link to nothing"),
        ("loop", "got a file or a link to nothing"),
        ("file/d", "got a file or a link to nothing"),
    ],
    ids=["long", "bytes", "between", "link", "behind a link", "loop", "file"],
)
def test_a_name_that_no_folder_can_have_is_refused_before_anything_is_loaded(bad_names, name, said):
    folder = bad_names / name
    (problem,) = dump_folder.problems(Dump(folder=str(folder)), None)
    assert said in problem
    with pytest.raises(AdmissionError, match="expected a folder that can be written"):  # where only a rank can tell
        FolderDump(folder, Dump(), MODEL, rank=0, layers=(0,))
    assert {file.name for file in bad_names.iterdir()} == {"file", "to nothing", "loop"} | (
        {"a"} if "/b" in name else set()
    )


def test_a_folder_that_can_be_made_is_not_made_yet(tmp_path):
    for name in ("d", "a/b/c", "a/../d", "a/../../d", "x" * 255):
        assert not list(dump_folder.problems(Dump(folder=str(tmp_path / "x" / name)), None))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("length", [8192, 131072])
def test_the_rows_of_prompts_of_whole_pages_lie_anywhere_in_a_page(dump, length):
    """One in each part of the last chunk, the prompt's last row among them, and others for another prompt."""
    span = Span(0, 10, 4096, 0, length, left=0)
    positions = [[span.seen_by(row) - 1 for row in dump._rows(span, number)] for number in range(200)]
    for each in positions:
        parts = [range(4096 * part // 5, 4096 * (part + 1) // 5) for part in range(5)]
        assert all(at + 4096 - length in part for at, part in zip(each, parts, strict=True))
        assert each[-1] == length - 1
    places = Counter(at % PAGE for each in positions for at in each[:-1])
    assert len(places) == PAGE
    assert max(places.values()) < 3 * places.total() / PAGE


@pytest.mark.parametrize("choosing", [1, 4, 5, 6, 9])
def test_rows_of_a_prompt_differ(dump, choosing):
    """Also where few more see enough than are asked for."""
    span = Span(0, 0, 200, 0, TOPK + choosing, left=0)
    for number in range(50):
        rows = dump._rows(span, number)
        assert len(set(rows)) == len(rows) == min(5, choosing)
        assert all(span.seen_by(row) > TOPK for row in rows)


def test_a_request_without_new_rows_has_none_to_dump(dump):
    assert dump._rows(Span(0, 7, 0, 0, TOPK + 5, left=0), 0) == []
