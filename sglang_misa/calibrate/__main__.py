"""A policy for each layer that keeps a target recall at the least cost, from index tensors of your own prompts.

    python -m sglang_misa.calibrate FILE… --target 0.98 --out policy.json [--plot policy.png]
    python -m sglang_misa.calibrate --server URL --dump DIR [--prompts FILE…] --target 0.98 --out policy.json

FILE: what a server wrote with --misa-dump. With --server, prompts (yours, or built-in texts) go through a server that
was started with --misa-dump DIR on this machine, and the files that it writes are read. Each prompt is sent again with
its answer, so that decode is measured on what generated tokens ask; files alone hold the rows of prompts. Half of the
prompts, or of one prompt's rows, is held out: the choice does not see it, and its recall is in the policy file beside
the target. A layer without a file stays with stock DSA.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from sglang_misa import __version__, key_mask
from sglang_misa.arguments import at_least, device, file_to_write, picture
from sglang_misa.bench import selection
from sglang_misa.calibrate import choice, prompts
from sglang_misa.calibrate.choice import Dumped, Point
from sglang_misa.calibrate.costs import SHIPPED, Costs, Measured, Modelled, by_heads
from sglang_misa.calibrate.picture import draw
from sglang_misa.config import PHASES, PRESETS, ConfigError, Phase, SelectionPolicy
from sglang_misa.outlet import kept_stdout
from sglang_misa.policy import EXACT, STOCK, rest_of_gate
from sglang_misa.policy_file import LayerPolicy, ModelIdentity, PolicyFile
from sglang_misa.refusal import Refusal
from sglang_misa.text_tables import ranges, table
from sglang_misa.validation import validated

REFUSED, INTERRUPTED = 2, 130
MODEL = "model"  # instead of a table of costs
GATED: dict[Phase, SelectionPolicy] = {"prefill": PRESETS["fast"].prefill, "decode": PRESETS["faithful"].decode}
Chosen = dict[int, dict[Phase, Point]]


@dataclass(frozen=True)
class Dumps:
    """What was dumped of one model, by layer."""

    model: ModelIdentity
    layers: Mapping[int, Sequence[Dumped]]

    @classmethod
    def read(cls, dumped: Sequence[Dumped]) -> Dumps:
        """Sort `dumped`. Raises ConfigError for a file that is no dump, and for files of several models."""
        models: dict[ModelIdentity, Path] = {}
        layers: dict[int, list[Dumped]] = {}
        if twice := [str(path) for path, n in Counter(each.path.resolve() for each in dumped).items() if n > 1]:
            raise ConfigError([f"FILE: expected each file once, as some are held out, got {twice[0]} twice; drop it"])
        for each in sorted(dumped, key=lambda each: each.path):
            model, layer, _ = _header(each.path)
            models.setdefault(model, each.path)
            layers.setdefault(layer, []).append(each)
        if len(models) != 1:
            listed = ", ".join(map(str, models.values())) or "no file"
            raise ConfigError([f"FILE: expected dumps of one model, got {listed}; give those of one"])
        (model,) = models
        if beyond := sorted(layers.keys() - set(range(model.layers))):
            raise ConfigError(
                [f"FILE: expected layers 0 to {model.layers - 1} of this model, got {beyond[0]}; dump it again"]
            )
        return cls(model, layers)


def _header(path: Path) -> tuple[ModelIdentity, int, int]:
    """Model, layer and number of keys of a dump. Raises ConfigError for a file that is none."""
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            keys = file.get_slice("index_k").get_shape()[0]
        return ModelIdentity.model_validate_json(facts["model"]), int(facts["layer"]), keys
    except (OSError, LookupError, ValueError, ValidationError, SafetensorError) as error:
        raise ConfigError([f"FILE: expected what --misa-dump writes, got {path} ({error!r}); dump it again"]) from None


@kept_stdout()
def main(words: Sequence[str] | None = None) -> int:
    """Calibrate, write the policy file and tell; returns the exit status: 0, 2 refused, 130 interrupted."""
    given = _parser().parse_args(words)
    try:
        _calibrate(given)
    except Refusal as error:
        print(error, file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        left = "is written" if given.out.exists() else "was not written, and the same command begins anew"
        print(f"interrupted: {given.out} {left}", file=sys.stderr)
        return INTERRUPTED
    return 0


def _calibrate(given: argparse.Namespace) -> None:
    if given.out.exists():
        raise ConfigError([f"--out: expected a new file, got {given.out}; remove it, or name another"])
    names = {name: f"--{name.replace('_', '-')}" for name in SelectionPolicy.model_fields}
    for phase in PHASES:
        validated(SelectionPolicy, _gates(phase, given), phase, names)
    dumps, length, costs = _judged(given, _dumped(given))
    found = {}
    for layer, each in sorted(dumps.layers.items()):
        settings = {"length": length, "rows": given.rows, "device": given.device}
        found[layer] = choice.points(each, dumps.model, costs, **settings)
        print(f"layer {layer}: {len(each)} files", file=sys.stderr, flush=True)
    chosen = _chosen(found, given.target)
    file = _policy_file(dumps.model, chosen, given, length)
    ConfigError.raise_if(file.problems())
    with given.out.open("x") as stream:
        stream.write(file.model_dump_json(indent=1, exclude_defaults=True) + "\n")
    print("\n".join(_told(dumps.model, chosen, costs, given, length)))
    if given.plot is not None:
        draw(found, chosen, given.target, costs.source, given.plot)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_misa.calibrate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--server", metavar="URL", help="send prompts to this server, which dumps to --dump")
    parser.add_argument("--dump", type=Path, metavar="DIR", help="the server's --misa-dump")
    parser.add_argument("--prompts", nargs="+", type=Path, metavar="FILE", help="texts, or .jsonl; default: built in")
    parser.add_argument("--count", type=at_least(1), default=4, help="built-in prompts to send (default: 4)")
    parser.add_argument("--key-file", metavar="FILE", help="a file with the server's API key")
    parser.add_argument("--target", type=float, required=True, help="recall of DSA's tokens to keep in every layer")
    parser.add_argument(
        "--length",
        type=at_least(1),
        help="keys that a row sees, at most, and tokens of a built-in prompt, roughly "
        f"(default: {selection.LENGTH}, or what the longest prompt holds if that is less)",
    )
    parser.add_argument("--rows", type=at_least(2), default=64, help="rows of each file (default: 64)")
    gates = ", ".join(f"{phase} {policy.min_len}" for phase, policy in GATED.items())
    parser.add_argument(
        "--min-len", type=at_least(0), help=f"tokens up to which stock DSA selects (default: the presets', {gates})"
    )
    parser.add_argument(
        "--min-rows",
        type=at_least(1),
        help=f"rows under which stock DSA selects in a decode step (default: the presets', {GATED['decode'].min_rows})",
    )
    parser.add_argument(
        "--min-tokens",
        type=at_least(0),
        help="tokens beyond --min-len for each row, of all together, under which stock DSA selects in a decode step "
        f"(default: the presets', {GATED['decode'].min_tokens}, or 0 where another gate is given)",
    )
    parser.add_argument(
        "--new-tokens", type=at_least(1), default=128, help="tokens of an answer, for decode (default: 128)"
    )
    parser.add_argument(
        "--costs", default=str(SHIPPED), metavar="FILE|model", help="a CSV of bench.kernels (default: ours), or a model"
    )
    parser.add_argument(
        "--batch", type=at_least(1), default=64, help="requests of a decode step, for its cost (default: 64)"
    )
    parser.add_argument("--device", type=device, default="cpu", help="where to compute: cpu or cuda")
    parser.add_argument("--out", type=file_to_write, required=True, metavar="FILE", help="the policy file to write")
    parser.add_argument("--plot", type=picture, metavar="FILE", help="draw recall against cost there")
    return parser


def _dumped(given: argparse.Namespace) -> list[Dumped]:
    """What to read: the files that are named, or those that the server writes for the prompts."""
    if not 0 < given.target <= 1:
        raise ConfigError([f"--target: expected more than 0 and at most 1, got {given.target}; correct it"])
    if given.costs != MODEL:
        by_heads(Path(given.costs))  # raises where it is no table, before files are read or prompts sent
    if (given.server is None) != (given.dump is None) or (given.server is None) != bool(given.files):
        raise ConfigError(["expected files, or --server with its --dump, got neither or both; choose one"])
    if given.server is None:
        return [Dumped(path) for path in given.files]
    if not given.dump.is_dir():
        raise ConfigError(
            [f"--dump: expected the folder that the server has as --misa-dump, got {given.dump}; correct it"]
        )
    tokens = given.length or selection.LENGTH
    texts = prompts.read(given.prompts) if given.prompts else [*prompts.built_in(given.count, tokens)]
    key = None if given.key_file is None else key_mask.read("--key-file", given.key_file)
    found: list[Dumped] = []
    for number, text in enumerate(texts):
        before, first = _in(given.dump), not found
        answer = prompts.ask(given.server, number, text, given.new_tokens, key)
        prompt = _in(given.dump)
        found += [Dumped(path) for path in prompt - before]
        if found and first:
            _judged(given, found)  # by the model that the first dump tells, before more is sent
        keys = {_header(path)[2] for path in prompt - before}  # of several prompts where others ask this server too
        if keys and answer.tokens not in keys:
            raise ConfigError(
                [
                    f"--server: expected prompt_tokens of prompt {number} to be the keys dumped of it, "
                    f"{', '.join(map(str, sorted(keys)))}, got {answer.tokens}; ask the server itself, without a proxy"
                ]
            )
        prompts.ask(given.server, number, text + answer.text, 1, key)
        found += [Dumped(path, answer.tokens) for path in _in(given.dump) - prompt]
    answers = sum(each.answer is not None for each in found)
    if not 0 < answers < len(found):
        raise ConfigError(
            [
                f"--dump: expected new files of prompts and of answers in {given.dump}, got {len(found) - answers} and "
                f"{answers}; start the server with it as its --misa-dump, "
                "raise --misa-dump-gib there, or send prompts longer than the model's top-k"
            ]
        )
    return found


def _in(folder: Path) -> set[Path]:
    return set(folder.glob("*.safetensors"))


def _judged(given: argparse.Namespace, dumped: Sequence[Dumped]) -> tuple[Dumps, int, Costs]:
    """What was dumped, the length to measure at, and what policies cost there. Raises ConfigError."""
    dumps = Dumps.read(dumped)
    lengths = [] if given.length is None else [given.length]
    try:  # a server's prompts are as long as they turn out
        (length,) = selection.judged(
            (each.path for each in dumped), given.rows, lengths, bound=given.server is not None
        )
    except ValueError as error:
        raise ConfigError([str(error)]) from None
    heads = dumps.model.index_heads
    if given.costs == MODEL:
        return dumps, length, Modelled(heads, length)
    return dumps, length, Measured.read(Path(given.costs), heads, length, given.batch)


def _chosen(found: Mapping[int, Mapping[Phase, Sequence[Point]]], target: float) -> Chosen:
    """The choice of each layer. Pages have sketches of one width: where layers differ, all choose among the widest."""
    chosen = {layer: {phase: choice.choose(each[phase], target) for phase in PHASES} for layer, each in found.items()}
    widths = choice.sketch_widths(chosen)
    if len(widths) > 1:
        for layer, each in found.items():
            allowed = [point for point in each["decode"] if point.policy.sketch in (None, widths[-1])]
            chosen[layer]["decode"] = choice.choose(allowed, target)
    return chosen


def _policy_file(model: ModelIdentity, chosen: Chosen, given: argparse.Namespace, length: int) -> PolicyFile:
    layers = {str(layer): LayerPolicy() for layer in range(model.layers)}
    for layer, points in chosen.items():
        gated = {
            phase: point.policy.model_copy(update=_gates(phase, given)) if point.policy.active else STOCK
            for phase, point in points.items()
        }
        layers[str(layer)] = LayerPolicy(**gated, recall={phase: point.told() for phase, point in points.items()})
    return PolicyFile(
        model=model,
        created_by=f"sglang_misa.calibrate {__version__}",
        target_recall=given.target,
        length=length,
        layers=layers,
    )


def _gates(phase: Phase, given: argparse.Namespace) -> dict[str, int]:
    """Under what stock DSA selects, and at the end of a prompt."""
    names = ("min_len", "min_rows", "min_tokens") if phase == "decode" else ("min_len",)
    chosen = {name: value for name in names if (value := getattr(given, name)) is not None}
    return {name: getattr(GATED[phase], name) for name in (*names, "tail")} | rest_of_gate(chosen) | chosen


def _told(model: ModelIdentity, chosen: Chosen, costs: Costs, given: argparse.Namespace, length: int) -> Iterator[str]:
    points = [(layer, phase, point) for layer, each in chosen.items() for phase, point in each.items()]
    rows = [
        (
            *(layer, phase, point.policy.label, f"{point.cost:.3f}", f"{point.recall:.4f}"),
            f"{point.told().held_out:.4f}",
            "" if point.policy in (STOCK, EXACT) else f"{len(point.calibrated)} + {len(point.held_out)}",
        )
        for layer, phase, point in points
    ]
    yield table([("layer", "phase", "policy", "cost", "recall", "held out", "rows"), *rows])
    yield f"\nCost over stock's: {costs.source}. Target {given.target:g} at {length} keys: {given.out}"
    for kind in PHASES:
        missed = [layer for layer, phase, point in points if phase == kind and point.told().held_out < given.target]
        if missed:
            yield (
                f"Held out, {kind} keeps less than the target in layers {ranges(missed)}: more prompts or rows choose "
                "more surely"
            )
    without = [layer for layer in range(model.layers) if layer not in chosen]
    if without:
        yield f"Stock DSA, as there is no dump of them: layers {ranges(without)}"


if __name__ == "__main__":
    sys.exit(main())
