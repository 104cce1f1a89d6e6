"""The training of the small model, at a size that takes a second."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from sglang_misa.bench.load.prompts import prose
from sglang_misa.bench.quality.train import checkpoint, task
from sglang_misa.bench.quality.train.__main__ import LARGE, SMALL, Stage, Trainer
from sglang_misa.bench.quality.train.model import DsaModel
from sglang_misa.bench.quality.words import NAMES, VALUES
from sglang_misa.random_model import LATENT_DIM, Shape

TOY = Shape(
    hidden=32, layers=2, heads=2, q_rank=32, intermediate=32, dense_layers=2, index_heads=4, index_topk=32, vocab=1152,
    yarn_factor=1.0, context=512,
)  # fmt: skip


@pytest.fixture(scope="module")
def corpus():
    return task.small()


@pytest.fixture
def trainer(corpus):
    threads, stage = torch.get_num_threads(), Stage(64, 4, 3, 1.0)
    torch.set_num_threads(1)  # matrices so small only wait for another one
    yield Trainer(
        replace(SMALL, shape=TOY, latent=32, backbone=(stage,), indexer=(stage,), induction=False),
        corpus,
        seed=3,
        clock=itertools.count().__next__,
    )
    torch.set_num_threads(threads)


def test_names_and_values_are_one_token_each(corpus):
    assert all(len(corpus.tokenizer.encode(f" {word}").ids) == 1 for word in (*NAMES, *VALUES))
    assert len({*NAMES, *VALUES}) == len(NAMES) + len(VALUES)


@pytest.mark.parametrize("words", [1, 2])
def test_each_question_of_a_batch_has_its_fact_before_it(corpus, words):
    ids, asked = replace(corpus, words=words).batch(np.random.default_rng(0), 5, 256, 8)
    assert {8, 8 * words} == {int(at.sum()) for at in asked}
    for row, at in zip(ids, asked, strict=True):
        for value in np.flatnonzero(at):
            pair = row[value - 1 : value + 1]
            assert any((row[i : i + 2] == pair).all() for i in range(value - 2))


def test_a_tokenizer_trained_on_text_keeps_listed_words_whole(tmp_path):
    (tmp_path / "text.md").write_text(prose(3, 100_000))
    large = task.large([tmp_path], 1152, 100_000)
    assert all(len(large.tokenizer.encode(f" {word}").ids) == 1 for word in (*NAMES, *VALUES, "set", "get"))


def test_steps_lower_the_loss_of_backbone_and_indexers(trainer):
    def loss():
        trainer.rng = np.random.default_rng(9)
        return float(trainer.loss(*trainer.batch(trainer.size.backbone[0], 4))[0].detach())

    def divergence():
        trainer.rng = np.random.default_rng(9)
        total = sum(value for value, _ in trainer.divergence(trainer.size.indexer[0]))
        trainer.model.zero_grad()
        return total

    before = loss()
    trainer.train_backbone(50.0)  # ticks: a step takes one
    assert loss() < before - 1.0
    before = divergence()
    trainer.train_indexers(50.0)
    assert divergence() < 0.9 * before


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_training_begins_by_answering(corpus, size):
    stage = Stage(256, 1, 8, 1.0)
    trainer = Trainer(replace(size, backbone=(stage,)), corpus, seed=1)
    right, asked = trainer.answers(stage.tokens)
    assert right > 0.8 * asked


def test_a_filled_latent_changes_no_logits():
    torch.manual_seed(0)
    narrow, wide = DsaModel(TOY, 32), DsaModel(TOY, LATENT_DIM)
    for layer in narrow.model.layers:
        torch.nn.init.normal_(layer.self_attn.o_proj.weight, std=0.1)
    narrow.bfloat16().float()  # the export's rounding, so that only the filling differs
    wide.load_state_dict(checkpoint.tensors(narrow))
    ids = torch.randint(0, TOY.vocab, (48,))
    torch.testing.assert_close(wide.served(ids), narrow.served(ids), rtol=0, atol=2e-2)
