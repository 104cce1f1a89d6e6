"""The small trained model: training's own forward against the server, and the needles that the server finds."""

import base64
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from serving.conftest import Server, environment
from tokenizers import Tokenizer

from sglang_misa.bench.load.prompts import TextIds, prose
from sglang_misa.bench.quality import questions
from sglang_misa.bench.quality.train.__main__ import SMALL
from sglang_misa.bench.quality.train.model import DsaModel
from sglang_misa.demo_model import LATENT_DIM
from sglang_misa.procs import ServerProcess, free_port, is_healthy

pytestmark = pytest.mark.serving

MODEL = Path(questions.__file__).with_name("model")
TOPK, LAYERS = SMALL.shape.index_topk, SMALL.shape.layers
LENGTH = 640
START_LIMIT = 300


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port = free_port()
    command = (
        f"{sys.executable} -m sglang_misa.launch_server --misa-preset dsa --device cpu --model-path {MODEL} "
        f"--host 127.0.0.1 --port {port} --context-length 8192 --sleep-on-idle --enable-return-indexer-topk"
    ).split()
    log = tmp_path_factory.mktemp("trained") / "log"
    with ServerProcess(command, log, environ=environment()) as process:
        process.wait_ready(lambda: is_healthy(port), START_LIMIT)
        yield Server(process, port, MODEL)


@pytest.fixture(scope="module")
def asked():
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    source = TextIds(prose(7, 100_000), lambda text: tokenizer.encode(text).ids)
    shape = ([LENGTH], [0.0, 0.25, 0.5, 0.75, 1.0], 1, 8, 1, 7)
    return list(questions.needles(source, questions.TEMPLATES["pairs"], *shape))


def test_training_and_server_agree(server, asked):
    model = DsaModel(SMALL.shape, LATENT_DIM).bfloat16()
    model.load_state_dict(load_file(str(MODEL / "model.safetensors")))
    ids = list(asked[2].ids)
    chosen = []
    logits = model.served(torch.tensor(ids), lambda layer, seen: chosen.append(seen))

    extra = {"return_indexer_topk": True, "return_logprob": True, "logprob_start_len": 0}
    answer = server.json("/generate", server.body(ids, 1) | extra)["meta_info"]
    rows = np.frombuffer(base64.b64decode(answer["indexer_topk"]), np.int32).reshape(-1, LAYERS, TOPK)
    ours = [set(torch.nonzero(row)[:, 0].tolist()) for row in chosen[0]]
    theirs = [set(row[row >= 0].tolist()) for row in rows[:, 0]]
    shares = [len(a & b) / len(a) for a, b in zip(ours, theirs, strict=True)]
    assert ours[:TOPK] == theirs[:TOPK]
    assert np.mean(shares[TOPK:]) >= 0.99

    told = torch.tensor([value for value, *_ in answer["input_token_logprobs"][1:]])
    wanted = logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    difference = (told - wanted).abs()
    assert difference.median() < 0.02
    assert difference.mean() < 0.05


def test_the_model_finds_needles_at_every_depth(server, asked):
    missed = [(q.name, text) for q in asked if q.score(text := server.generate(list(q.ids), new=1).text) < 1]
    assert not missed


def test_the_checkpoint_says_how_it_was_made():
    with safe_open(str(MODEL / "model.safetensors"), "pt") as file:
        assert "--seed" in file.metadata()["trained"]
    assert json.loads((MODEL / "config.json").read_text())["index_topk"] == TOPK
    assert sum(file.stat().st_size for file in MODEL.iterdir()) < 5_000_000
