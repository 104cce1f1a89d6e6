"""The small trained model, served: training's own forward, needles, and a policy calibrated on the server's dumps."""

import base64
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from serving.conftest import Server, environment
from tokenizers import Tokenizer

from sglang_misa.bench import selection
from sglang_misa.bench.load.prompts import TextIds, prose
from sglang_misa.bench.quality import questions
from sglang_misa.bench.quality.cli import main
from sglang_misa.bench.quality.train.__main__ import SMALL
from sglang_misa.bench.quality.train.model import DsaModel
from sglang_misa.calibrate import __main__ as calibrate
from sglang_misa.config import PRESETS
from sglang_misa.demo import MODEL
from sglang_misa.kernels.layout import PAGE
from sglang_misa.policy_file import PolicyFile
from sglang_misa.procs import ServerProcess, free_port, is_healthy
from sglang_misa.random_model import LATENT_DIM

pytestmark = pytest.mark.serving

TOPK, LAYERS = SMALL.shape.index_topk, SMALL.shape.layers
LENGTH = 640
START_LIMIT = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


@contextmanager
def started(flags: str, log: Path) -> Iterator[Server]:
    port = free_port()
    command = (
        f"{sys.executable} -m sglang_misa.launch_server --device cpu --model-path {MODEL} --host 127.0.0.1 "
        f"--port {port} --context-length 8192 --sleep-on-idle {flags}"
    ).split()
    with ServerProcess(command, log, environ=environment()) as process:
        process.wait_ready(lambda: is_healthy(port), START_LIMIT)
        yield Server(process, port, MODEL)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    flags = f"--misa-preset dsa --enable-return-indexer-topk --misa-dump {folder}/dump"
    with started(flags, folder / "log") as server:
        yield server


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    source = TextIds(prose(7, 100_000), lambda text: tokenizer.encode(text).ids)
    (asked,) = questions.needles(source, questions.TEMPLATES["pairs"], [LENGTH], [0.5], 1, 8, 1, 7)
    return list(asked.ids)


def test_training_and_server_agree(server, prompt):
    model = DsaModel(SMALL.shape, LATENT_DIM).bfloat16()
    model.load_state_dict(load_file(str(MODEL / "model.safetensors")))
    chosen = []
    logits = model.served(torch.tensor(prompt), lambda layer, seen: chosen.append(seen))

    extra = {"return_indexer_topk": True, "return_logprob": True, "logprob_start_len": 0}
    answer = server.json("/generate", server.body(prompt, 1) | extra)["meta_info"]
    rows = np.frombuffer(base64.b64decode(answer["indexer_topk"]), np.int32).reshape(-1, LAYERS, TOPK)
    ours = [set(torch.nonzero(row)[:, 0].tolist()) for row in chosen[0]]
    theirs = [set(row[row >= 0].tolist()) for row in rows[:, 0]]
    shares = [len(a & b) / len(a) for a, b in zip(ours, theirs, strict=True)]
    assert ours[:TOPK] == theirs[:TOPK]
    assert np.mean(shares[TOPK:]) >= 0.99

    told = torch.tensor([value for value, *_ in answer["input_token_logprobs"][1:]])
    wanted = logits[:-1].log_softmax(-1).gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    difference = (told - wanted).abs()
    assert difference.median() < 0.02
    assert difference.mean() < 0.05


def test_the_model_finds_needles_at_every_depth(server, tmp_path):
    words = f"--lengths {LENGTH} --depths 5 --repeats 1 --template pairs --new-tokens 1 --expect dsa".split()
    assert main(["needles", f"http://127.0.0.1:{server.port}", *words, "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "needles.json").read_text())
    assert [(row["arm"], row["found"]) for row in results] == [("dsa", 1)] * 5
    assert {row["model"] for row in results} == {str(MODEL)}


def test_a_policy_is_calibrated_on_what_the_server_dumps(server, folder, tmp_path, monkeypatch):
    few = [each for each in selection.policies() if (each[1].heads, each[1].router) == (7, "peak")]
    monkeypatch.setattr(selection, "policies", lambda: few)
    prompts, out, target = tmp_path / "prompts.jsonl", tmp_path / "policy.json", 0.95
    prompts.write_text("".join(json.dumps({"text": prose(seed, 4000)}) + "\n" for seed in range(2)))
    words = f"--server http://127.0.0.1:{server.port} --dump {folder}/dump --prompts {prompts} --costs model --rows 8"
    words += f" --min-len {TOPK} --min-rows 4 --new-tokens 8 --target {target} --out {out}"
    assert calibrate.main(words.split()) == 0
    file = PolicyFile.read(str(out))
    assert list(file.model_problems(SimpleNamespace(**json.loads((MODEL / "config.json").read_text())))) == []
    assert [*file.problems()] == []
    for layer in file.layers.values():
        assert layer.prefill.active
        assert (layer.prefill.min_len, layer.prefill.tail) == (TOPK, PRESETS["fast"].prefill.tail)
        assert layer.recall["prefill"].held_out >= target - 0.01
    decodes = [layer.decode for layer in file.layers.values() if layer.decode.active]
    assert all((policy.min_rows, policy.min_tokens) == (4, 0) for policy in decodes)


def test_the_audit_tells_what_the_study_finds(tmp_path):
    """All rows of the same prompts, by the server while it selects and by `bench.selection` from its dumps."""
    rows, dump = 1000, tmp_path / "dump"
    flags = f"--misa-preset fast --misa-prefill-min-len {TOPK} --misa-prefill-block-size {PAGE} --misa-prefill-tail 0 "
    flags += f"--misa-audit-rows {rows} --misa-audit-every 1 --misa-dump {dump} --misa-dump-rows {rows}"
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    with started(flags, tmp_path / "log") as server:
        for seed in range(2):
            server.generate(tokenizer.encode(prose(seed, 40_000)).ids[: TOPK + rows], new=1)
        audited = server.misa()["recall"]["prefill"]
    policy = "prefill", PRESETS["fast"].prefill.model_copy(update={"block_size": PAGE, "min_len": 0, "tail": 0})
    for layer in range(LAYERS):
        files = sorted(dump.glob(f"*-layer-{layer:03}-*.safetensors"))
        studied = [selection.measure(selection.Layer.load(file, rows), 8192, [policy])[policy] for file in files]
        recall = float(torch.cat(studied).mean())
        assert audited[str(layer)]["rows"] == 2 * rows == sum(map(len, studied))
        assert audited[str(layer)]["recall"] == pytest.approx(recall, abs=1e-3)
        assert recall < 0.97, "there was nothing to lose"


def test_the_checkpoint_says_how_it_was_made():
    with safe_open(str(MODEL / "model.safetensors"), "pt") as file:
        assert "--seed" in file.metadata()["trained"]
    assert json.loads((MODEL / "config.json").read_text())["index_topk"] == TOPK
    assert sum(file.stat().st_size for file in MODEL.iterdir()) < 5_000_000
