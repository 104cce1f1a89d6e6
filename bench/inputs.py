"""Inputs of one request's indexer, by name: random, from a trained model, or adversarial to sampling and ranking.

random              nothing is shared; gates are heavy-tailed, one in ten negative
topics              stretches of 256 tokens share a direction, and queries lean towards some
trained:FILE        index tensors of a trained model (safetensors: index_q, head_gates, index_k, k_scale)
hostile:NAME        see HOSTILE; a number in the name is the period or the count, as in period-24
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sglang_misa.kernels.layout import HEAD_DIM, PAGE

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Inputs:
    """The keys of one request, and some of its queries."""

    index_q: Tensor  # [T, H, 128] fp8 e4m3
    head_gates: Tensor  # [T, H] fp32
    index_k: Tensor  # [L, 128] fp8 e4m3
    k_scale: Tensor  # [L] fp32


def pack_pages(index_k: Tensor, k_scale: Tensor) -> Tensor:
    """Index-K pages [n, 8448] uint8 of keys [64 n, 128] fp8 and scales [64 n] fp32, as SGLang lays them out."""
    pages = len(k_scale) // PAGE
    codes, scales = index_k.contiguous().view(torch.uint8), k_scale.contiguous().view(torch.uint8)
    return torch.cat([codes.view(pages, -1), scales.view(pages, -1)], dim=1)


def make(name: str, rows: int, length: int, heads: int, *, seed: int = 0, device: str = "cuda") -> Inputs:
    """`rows` queries of `heads` index heads and `length` keys, by name. Raises ValueError for an unknown one."""
    kind, _, rest = name.partition(":")
    generator = torch.Generator(device).manual_seed(seed)
    if kind in ("random", "topics") and not rest:
        return _random(rows, length, heads, generator, topics=kind == "topics")
    if kind == "trained" and rest:
        return _trained(Path(rest), rows, length, heads, generator)
    if kind == "hostile":
        word, number = re.fullmatch(r"(.*?)-?(\d*)", rest).groups()  # type: ignore[union-attr]
        if word in HOSTILE and bool(number) == HOSTILE[word].numbered:
            base = _random(rows, length, heads, generator, topics=False)
            arguments = (int(number),) if number else ()
            return HOSTILE[word].change(base, generator, *arguments)
    raise ValueError(
        f"inputs: expected random, topics, trained:FILE or hostile:NAME with one of {', '.join(names())}, got {name!r}"
    )


def _random(rows: int, length: int, heads: int, generator: torch.Generator, *, topics: bool) -> Inputs:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=generator.device, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, device=generator.device, generator=generator)

    keys, queries = normal(length, HEAD_DIM), normal(rows, heads, HEAD_DIM)
    if topics:
        topic = normal(length // 256 + 1, HEAD_DIM)
        keys += topic.repeat_interleave(256, 0)[:length]
        leaning = torch.randint(len(topic), (rows,), device=generator.device, generator=generator)
        queries += 0.7 * topic[leaning][:, None]
    gates = normal(rows, heads).mul_(1.5).exp_() * heads**-0.5
    gates *= torch.where(uniform(rows, heads) < 0.1, -1.0, 1.0)
    return Inputs(queries.to(FP8), gates, keys.to(FP8), uniform(length).add_(0.5))


@functools.cache
def trained_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of index tensors. Raises ValueError where it is none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path}: expected a safetensors file that can be read, got {error}; name files of --misa-dump"
        ) from None
    missing = [name for name in ("index_q", "head_gates", "index_k", "k_scale") if name not in tensors]
    if missing:
        raise ValueError(f"{path}: expected index tensors, got none by the name {', '.join(missing)}; see --misa-dump")
    gates = tensors["head_gates"]
    if gates.ndim != 2:
        raise ValueError(f"{path}: expected head_gates of [rows, heads], got {[*gates.shape]}; dump a prompt")
    (rows, heads), keys = gates.shape, len(tensors["index_k"])
    for name, shape, dtype in (
        ("index_q", (rows, heads, HEAD_DIM), FP8),
        ("head_gates", (rows, heads), torch.float32),
        ("index_k", (keys, HEAD_DIM), FP8),
        ("k_scale", (keys,), torch.float32),
    ):
        tensor = tensors[name]
        if tensor.shape != shape:
            found = [*tensor.shape]
            raise ValueError(f"{path}: expected {name} of {[*shape]}, got {found}; its tensors are not of one prompt")
        if tensor.dtype != dtype:
            raise ValueError(f"{path}: expected {name} in {dtype}, got {tensor.dtype}; store it as servers do")
        if not tensor.float().isfinite().all():
            raise ValueError(f"{path}: expected finite numbers in {name}, got NaN or infinity; dump a prompt again")
    if not rows or keys < PAGE:
        raise ValueError(f"{path}: expected rows, and keys of a page ({PAGE}), got {rows} and {keys}; dump a prompt")
    return tensors


def _trained(path: Path, rows: int, length: int, heads: int, generator: torch.Generator) -> Inputs:
    """The first `length` keys, and the file's rows over and over, in random order."""
    tensors = trained_file(path)
    held, of_file = len(tensors["k_scale"]), tensors["head_gates"].shape[1]
    if length > held or heads != of_file:
        raise ValueError(
            f"{path}: expected at most {held} keys and {of_file} index heads, got {length} and {heads}; ask for fewer"
        )
    device = generator.device
    picked = torch.randint(len(tensors["head_gates"]), (rows,), device=device, generator=generator).cpu()
    keys = (tensors[name][:length].to(device) for name in ("index_k", "k_scale"))
    return Inputs(tensors["index_q"][picked].to(device), tensors["head_gates"][picked].to(device), *keys)


@dataclass(frozen=True)
class Hostile:
    """One way to change random inputs; `numbered`: its name ends in a number, which `change` takes."""

    change: Callable[..., Inputs]
    numbered: bool = False


def _repeat(inputs: Inputs, index: Tensor) -> Inputs:
    return replace(inputs, index_k=_take(inputs.index_k, index), k_scale=inputs.k_scale[index])


def _take(codes: Tensor, index: Tensor) -> Tensor:
    return codes.view(torch.uint8)[index].view(FP8)  # fp8 has no index kernel on every device


def _positions(inputs: Inputs) -> Tensor:
    return torch.arange(len(inputs.k_scale), device=inputs.k_scale.device)


def _period(inputs: Inputs, generator: torch.Generator, period: int) -> Inputs:
    return _repeat(inputs, _positions(inputs) % period)


def _mixed(inputs: Inputs, generator: torch.Generator, period: int) -> Inputs:
    """Every other stretch of 4096 tokens repeats its first `period` keys; the others are text."""
    at = _positions(inputs)
    return _repeat(inputs, torch.where(at // 4096 % 2 == 0, at // 4096 * 4096 + at % 4096 % period, at))


def _distinct(inputs: Inputs, generator: torch.Generator, count: int) -> Inputs:
    index = torch.randint(count, inputs.k_scale.shape, device=generator.device, generator=generator)
    return _repeat(inputs, index.clamp(max=len(inputs.k_scale) - 1))


def _zero_scores(inputs: Inputs, generator: torch.Generator) -> Inputs:
    """No product is positive, so that ReLU leaves nothing."""
    return replace(
        inputs, index_q=inputs.index_q.float().abs().to(FP8), index_k=inputs.index_k.float().abs().neg().to(FP8)
    )


def _scaled(inputs: Inputs, factor: Tensor | float) -> Inputs:
    return replace(inputs, k_scale=inputs.k_scale * factor)


def _some(inputs: Inputs, generator: torch.Generator, value: float, share: float) -> Inputs:
    """`value` in the place of the scales of a random share of the keys."""
    hit = torch.rand(inputs.k_scale.shape, device=generator.device, generator=generator) < share
    return replace(inputs, k_scale=inputs.k_scale.masked_fill(hit, value))


HOSTILE: dict[str, Hostile] = {
    "one-key": Hostile(lambda x, g: _period(x, g, 1)),
    "distinct": Hostile(_distinct, numbered=True),
    "period": Hostile(_period, numbered=True),
    "mixed": Hostile(_mixed, numbered=True),
    "zero-scores": Hostile(_zero_scores),
    "negative-gates": Hostile(lambda x, g: replace(x, head_gates=-x.head_gates.abs())),
    "growing": Hostile(lambda x, g: _scaled(x, torch.linspace(0.1, 1, len(x.k_scale), device=x.k_scale.device))),
    "loud-tail": Hostile(lambda x, g: _scaled(x, torch.where(_positions(x) >= len(x.k_scale) - 4096, 100.0, 1.0))),
    "nan-keys": Hostile(lambda x, g: _some(x, g, torch.nan, 0.3)),
    "inf-keys": Hostile(lambda x, g: _some(_some(x, g, -torch.inf, 0.01), g, torch.inf, 0.01)),
    "zero-scales": Hostile(lambda x, g: _some(x, g, 0.0, 0.9)),
    "negative-scales": Hostile(lambda x, g: _scaled(x, torch.where(_positions(x) % 2 == 0, -1.0, 1.0))),
    "denormal-scales": Hostile(lambda x, g: _scaled(x, 1e-39)),
}
PERIODS = (2, 3, 4, 5, 7, 8, 10, 12, 16, 24, 32, 48, 64, 96, 100, 128, 192, 256, 384, 512)


def names() -> list[str]:
    """The hostile inputs, with the numbers that the benchmarks use."""
    numbers = {"distinct": (64, 4096), "period": PERIODS, "mixed": (24, 64)}
    return [f"{word}-{n}" for word, ns in numbers.items() for n in ns] + [
        word for word, hostile in HOSTILE.items() if not hostile.numbered
    ]
