"""Decode's last top k: the CUDA source compiled for the CPU (simt/) against its twin in PyTorch."""

import ctypes

import numpy as np
import pytest
import torch
from on_cpu import COMPILER, aligned, call

from sglang_misa.kernels.decode.keep_blocks import KeptPages
from sglang_misa.kernels.decode.operands import Chosen
from sglang_misa.kernels.decode.topk_kept import topk_kept, topk_listed
from sglang_misa.kernels.layout import PAGE

K, BLOCK = 128, 2 * PAGE
LENS = (0, 1, K, K + 1, 1000, 4096, 4999)
SPECIAL = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45, 3e38], np.float32)

pytestmark = COMPILER
LIBRARIES = [("topk_kept", {})]


@pytest.fixture(scope="module")
def kernels(library) -> ctypes.CDLL:
    return library("topk_kept")


def scores(name: str, room: int) -> np.ndarray:
    random = np.random.default_rng(room)
    made = {
        "any": random.normal(size=(len(LENS), room)),
        "one": np.ones((len(LENS), room)),
        "few": random.integers(0, 3, (len(LENS), room)),
        "crowded": 1 + random.integers(0, 1 << 12, (len(LENS), room)) * 2.0**-23,
        "special": random.choice(SPECIAL, (len(LENS), room)),
    }
    return aligned(made[name], np.float32)


NAMES = ["any", "one", "few", "crowded", "special"]


@pytest.mark.parametrize("placed", [True, False], ids=["with positions", "slots alone"])
@pytest.mark.parametrize("name", NAMES)
def test_kept_tokens(kernels, name, placed):
    room = 5120
    random = np.random.default_rng(3)
    pages = random.permutation(1 << 12)[: len(LENS) * room // PAGE].reshape(len(LENS), -1).astype(np.int32)
    blocks = np.sort(random.permutation(1 << 10)[: len(LENS) * room // BLOCK].reshape(len(LENS), -1)).astype(np.int32)
    logits, lens = scores(name, room), np.array(LENS, np.int32)
    got, at = np.full((2, len(LENS), K), -9, np.int32)
    place = at if placed else None
    call(kernels.kept_rows, logits, lens, pages, blocks, room, BLOCK, got, place, K, len(LENS))

    expected, places = torch.empty(2, len(LENS), K, dtype=torch.int32)
    held = map(torch.from_numpy, (pages, blocks, lens))
    kept = KeptPages(*held, scores=torch.empty(0), done=torch.empty(0))
    assert kept.block_size == BLOCK
    topk_kept(torch.from_numpy(logits), kept, Chosen(expected, places))
    assert np.array_equal(got, expected.numpy())
    assert not placed or np.array_equal(at, places.numpy())


@pytest.mark.parametrize("name", NAMES)
def test_listed_tokens(kernels, name):
    room = 4096
    random = np.random.default_rng(4)
    lens = np.array(LENS, np.int32)
    listed = np.sort([random.permutation(max(n, room))[:room] for n in LENS]).astype(np.int32)
    table = random.permutation(1 << 12)[: len(LENS) * 80].reshape(len(LENS), -1).astype(np.int32)
    logits, (got, at) = scores(name, room), np.full((2, len(LENS), K), -9, np.int32)
    call(kernels.listed_rows, logits, lens, aligned(listed, np.int32), table, 80, room, got, at, K, len(LENS))

    tensors = [torch.from_numpy(array) for array in (logits, listed, table, lens)]
    expected, places = torch.empty(2, len(LENS), K, dtype=torch.int32)
    topk_listed(*tensors, Chosen(expected, places))
    assert np.array_equal(got, expected.numpy())
    assert np.array_equal(at, places.numpy())
