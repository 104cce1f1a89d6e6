"""Train a small DeepSeek-V3.2-architecture model that answers needles, and write it as SGLang serves it.

First the backbone under dense attention, over growing contexts; then, with it frozen, each layer's indexer by the
divergence of its softmax from the attention, on sampled rows (the first stage of DSA's training).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sglang_misa.bench.quality.train import checkpoint, fused, task
from sglang_misa.bench.quality.train.induction import begin_as_induction
from sglang_misa.bench.quality.train.model import DsaModel, index_scores
from sglang_misa.bench.quality.train.task import Corpus
from sglang_misa.random_model import LATENT_DIM, Shape

WARMUP = 20  # steps
INDEXER_LR = 2e-3
REPORT = 10.0  # seconds between lines of the log
CHECKED, ASKED = 4, 64  # rows of a check, and their questions
HELD_OUT = 1  # its seed, beside the training's
CHARACTERS = 100_000_000
ANSWER_WEIGHT = 0.5  # of the loss on asked values, beside the mean over all tokens
MEASURED = """--size large on one H200, shared with other work: 0.1 s a step at 64 x 1024 tokens, 0.15 at 8 x 8192, 0.4
to 0.7 at 2 x 32768, 2.5 at 1 x 131072, and 16 s for the tokens of the text (bench/results/train-large.log). After
--stop backbone, the same --out goes on from backbone.pt."""


@dataclass(frozen=True)
class Stage:
    """Steps at one length. share: of the time; pairs: facts and questions a row."""

    tokens: int
    rows: int
    pairs: int
    share: float


@dataclass(frozen=True)
class Size:
    """A model and how it is trained.

    latent: trained rank of keys and values; seconds: default limits; induction: whether it begins as that circuit.
    """

    shape: Shape
    latent: int
    lr: float
    backbone: tuple[Stage, ...]
    indexer: tuple[Stage, ...]  # rows: sampled query rows of one sequence
    seconds: tuple[float, float]
    induction: bool = True


SMALL = Size(
    shape=Shape(
        hidden=128,
        layers=2,
        heads=2,
        q_rank=64,
        intermediate=64,
        dense_layers=2,
        index_heads=32,
        index_topk=256,
        vocab=1152,
        yarn_factor=1.0,
        context=8192,
    ),
    latent=64,
    lr=1e-3,
    backbone=(Stage(256, 8, 14, 0.4), Stage(1024, 2, 40, 0.3), Stage(4096, 1, 48, 0.3)),
    indexer=(Stage(1024, 128, 40, 0.5), Stage(4096, 128, 48, 0.5)),
    seconds=(180.0, 180.0),
)
LARGE = Size(
    shape=Shape(
        hidden=512,
        layers=4,
        heads=8,
        q_rank=256,
        intermediate=1024,
        dense_layers=4,
        index_heads=64,
        index_topk=2048,
        vocab=4096,
        yarn_factor=1.0,
        rope_theta=1e6,
    ),
    latent=LATENT_DIM,
    lr=2e-3,
    backbone=(
        Stage(1024, 64, 32, 0.05),
        Stage(8192, 8, 128, 0.25),
        Stage(32768, 2, 512, 0.3),
        Stage(131072, 1, 2048, 0.4),
    ),
    indexer=(Stage(32768, 256, 512, 0.5), Stage(131072, 96, 2048, 0.5)),
    seconds=(460.0, 230.0),
)
SIZES = {"small": SMALL, "large": LARGE}


class Muon:
    """Momentum whose step is made orthogonal by five Newton-Schulz rounds, for matrices (Jordan et al., 2024)."""

    def __init__(self, matrices: list[nn.Parameter]):
        self._all = [(matrix, torch.zeros_like(matrix)) for matrix in matrices]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for matrix, momentum in self._all:
            assert matrix.grad is not None
            momentum.mul_(0.95).add_(matrix.grad)
            step = _orthogonal(matrix.grad.add(momentum, alpha=0.95))
            matrix.add_(step, alpha=-lr * max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5)
            matrix.grad = None


def _orthogonal(matrix: Tensor) -> Tensor:
    x = matrix.bfloat16() if matrix.is_cuda else matrix
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.T if tall else x).to(matrix.dtype)


class Trainer:
    """One model under training, on the GPU where there is one. clock: tells the seconds that a limit is in."""

    def __init__(self, size: Size, corpus: Corpus, seed: int, clock: Callable[[], float] = time.monotonic):
        torch.manual_seed(seed)
        torch.set_float32_matmul_precision("high")
        self.size, self.corpus, self.seed, self.clock = size, corpus, seed, clock
        self.rng = np.random.default_rng(seed)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = DsaModel(size.shape, size.latent)
        if size.induction:
            begin_as_induction(self.model)
        else:
            nn.init.normal_(self.model.model.embed_tokens.weight, std=0.02)
        self.model.to(self.device)
        if self.device.type == "cuda":
            print(f"attention: {fused.choose(size.shape.heads)}", flush=True)

    def batch(self, stage: Stage, rows: int) -> tuple[Tensor, Tensor]:
        ids, asked = self.corpus.batch(self.rng, rows, stage.tokens, stage.pairs)
        return torch.from_numpy(ids).to(self.device), torch.from_numpy(asked).to(self.device)

    def loss(self, ids: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
        """(mean loss over all tokens, mean loss over asked values) of one batch."""
        positions = torch.arange(ids.shape[1] - 1, device=self.device)
        with self.autocast():
            logits = self.model.lm_head(self.model.hidden(ids[:, :-1], positions))
        each = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return each.mean(), each[asked[:, 1:].flatten()].mean()

    def check(self) -> None:
        """Prints how many of new facts' words are right, at the length of each stage."""
        for stage in self.size.backbone:
            right, asked = self.answers(stage.tokens)
            print(f"dense attention, {stage.tokens} tokens: {right} of {asked} asked words right", flush=True)

    @torch.no_grad()
    def answers(self, tokens: int) -> tuple[int, int]:
        """(right, asked) words of new facts in some rows of `tokens`, under dense attention."""
        rng = np.random.default_rng([self.seed, HELD_OUT, tokens])
        positions = torch.arange(tokens - 1, device=self.device)
        right = total = 0
        for _ in range(CHECKED):
            parts = self.corpus.batch(rng, 1, tokens, min(ASKED, tokens // 32))
            ids, asked = (torch.from_numpy(part).to(self.device) for part in parts)
            with self.autocast():
                hidden = self.model.hidden(ids[:, :-1], positions)
                told = self.model.lm_head(hidden[asked[:, 1:]]).argmax(-1)
            right += int((told == ids[asked]).sum())
            total += len(told)
        return right, total

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def train_backbone(self, seconds: float) -> None:
        """Every parameter but the indexers', over the size's stages."""
        named = [(n, p) for n, p in self.model.named_parameters() if ".indexer." not in n]
        matrices = [p for n, p in named if p.ndim == 2 and ".layers." in n] if self.size is LARGE else []
        rest = [p for n, p in named if not any(p is matrix for matrix in matrices)]
        muon, adam = Muon(matrices), torch.optim.AdamW(rest, lr=self.size.lr, betas=(0.9, 0.95), weight_decay=0.0)

        def step(stage: Stage, rate: float) -> str:
            text, answers = self.loss(*self.batch(stage, stage.rows))
            (text + ANSWER_WEIGHT * answers).backward()
            muon.step(10 * self.size.lr * rate)
            _step(adam, self.size.lr * rate)
            return f"loss {text:.3f} answers {answers:.3f}"

        self._stages("backbone", self.size.backbone, seconds, step)

    def train_indexers(self, seconds: float) -> None:
        """The indexers alone, by KL to the attention averaged over heads, on sampled rows."""
        self.model.requires_grad_(False)
        parts = [p for n, p in self.model.named_parameters() if ".indexer." in n]
        for part in parts:
            part.requires_grad_(True)
        adam = torch.optim.AdamW(parts, lr=INDEXER_LR, betas=(0.9, 0.98), weight_decay=0.0)

        def step(stage: Stage, rate: float) -> str:
            told = self.divergence(stage)
            _step(adam, INDEXER_LR * rate)
            return "KL, attention kept: " + "  ".join(f"{value:.3f} {kept:.3f}" for value, kept in told)

        self._stages("indexer", self.size.indexer, seconds, step)

    def divergence(self, stage: Stage) -> list[tuple[float, float]]:
        """Adds the gradient of every layer's KL on rows of one sequence, half of them about to answer.

        Returns each layer's KL, and the attention to the `index_topk` best tokens of its indexer.
        """
        ids, asked = self.batch(stage, 1)
        late = asked[0].nonzero()[:, 0].cpu().numpy() - 1
        half = stage.rows // 2
        drawn = (self.rng.choice(late, min(half, len(late)), replace=False), self.rng.choice(stage.tokens, half))
        rows = torch.from_numpy(np.unique(np.concatenate(drawn))).to(self.device)
        positions = torch.arange(stage.tokens, device=self.device)
        ahead = positions[None] > rows[:, None]
        topk, told = self.model.shape.index_topk, []
        with self.autocast():
            x = self.model.model.embed_tokens(ids)
            for layer in self.model.model.layers:
                attention = layer.self_attn
                normed = layer.input_layernorm(x)
                with torch.no_grad():
                    q, k, _ = attention.parts(normed, positions)
                    teacher = _attention(q[0, :, rows], k[0], ahead)
                    latent = attention.latent(normed[0, rows])
                query, gates = attention.indexer.queries(normed[0, rows], latent, rows)
                scores = index_scores(query, gates, attention.indexer.keys(normed[0], positions))
                student = scores.float().masked_fill(ahead, -torch.inf).log_softmax(-1).masked_fill(ahead, 0)
                entropy = (teacher * teacher.clamp_min(1e-20).log()).sum(-1)
                divergence = (entropy - (teacher * student).sum(-1)).mean()
                divergence.backward()
                with torch.no_grad():
                    best = student.masked_fill(ahead, -torch.inf).topk(min(topk, stage.tokens), -1).indices
                    told.append((float(divergence.detach()), float(teacher.gather(1, best).sum(-1).mean())))
                    x = layer(x, positions)
        return told

    def _stages(self, name: str, stages: Sequence[Stage], seconds: float, step: Callable[[Stage, float], str]) -> None:
        """Train over `stages` for so many seconds; `step` takes a stage and a share of the learning rate, and tells."""
        begin, count, before, last = self.clock(), 0, 0.0, -REPORT
        for stage in stages:
            before += stage.share
            while (done := (self.clock() - begin) / seconds) < before:
                rate = min(1.0, (count + 1) / WARMUP) * min(1.0, max(0.02, 2 * (1 - done)))
                told = step(stage, rate)
                if done * seconds - last >= REPORT:
                    last = done * seconds
                    print(f"{name} {stage.tokens} step {count} {told} {last:.0f} s", flush=True)
                count += 1


def _attention(q: Tensor, k: Tensor, ahead: Tensor) -> Tensor:
    """Attention [R, T] fp32 averaged over heads of q [heads, R, 192] and k [heads, T, 192], a head at a time."""
    with torch.autocast(q.device.type, enabled=False):
        total = torch.zeros(ahead.shape, device=q.device)
        for one, keys in zip(q.float(), k.float(), strict=True):
            total += (one @ keys.T * one.shape[-1] ** -0.5).masked_fill(ahead, -torch.inf).softmax(-1)
        return total / len(q)


def _step(adam: torch.optim.Optimizer, lr: float) -> None:
    for group in adam.param_groups:
        nn.utils.clip_grad_norm_(group["params"], 1.0)
        group["lr"] = lr
    adam.step()
    adam.zero_grad(set_to_none=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_misa.bench.quality.train",
        description=__doc__,
        epilog=MEASURED,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model, and of backbone.pt")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="folders of text files, for --size large")
    parser.add_argument("--seconds", type=float, nargs=2, help="of the backbone and of the indexers")
    parser.add_argument("--stop", choices=("backbone",), help="leave after it")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    size = SIZES[options.size]
    if size is LARGE and not options.text:
        parser.error("--text: expected folders of text for --size large, got none; name some")
    begin = time.monotonic()
    corpus = task.small() if size is SMALL else task.large(options.text, size.shape.vocab, CHARACTERS)
    print(f"{len(corpus.stream)} tokens of text, {time.monotonic() - begin:.0f} s", flush=True)
    trainer = Trainer(size, corpus, options.seed)
    seconds = options.seconds or size.seconds
    options.out.mkdir(parents=True, exist_ok=True)
    kept = options.out / "backbone.pt"
    if kept.exists():
        trainer.model.load_state_dict(torch.load(kept, weights_only=True))
    else:
        trainer.check()
        trainer.train_backbone(seconds[0])
        half = {name: value.bfloat16().cpu() for name, value in trainer.model.state_dict().items()}
        torch.save(half, kept)
    trainer.check()
    if options.stop == "backbone":
        return 0
    trainer.train_indexers(seconds[1])
    note = f"sglang_misa.bench.quality.train --size {options.size} --seed {options.seed}"
    checkpoint.export(trainer.model, corpus.tokenizer, options.out, note)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
