"""A policy for each layer that keeps a target recall at the least cost, from index tensors of your own prompts.

    python -m sglang_misa.calibrate FILE… --target 0.98 --out policy.json [--plot policy.png]
    python -m sglang_misa.calibrate --server URL --dump DIR [--prompts FILE…] --target 0.98 --out policy.json

FILE: what a server wrote with --misa-dump. With --server, prompts (yours, or built-in texts) go through a server that
was started with --misa-dump DIR on this machine, and the files that it writes are read. Each prompt is sent again with
its answer, so that decode is measured on what generated tokens ask; files alone hold the rows of prompts. Half of the
prompts, or of one prompt's rows, is held out: the choice does not see it, and its recall is in the policy file beside
the target. Prompts that share most of their keys are in one half. Rows that stock DSA selects when serving, under the
gate or in the last of a prompt, do not count. A layer without a file, or without rows, stays with stock DSA.
"""

from __future__ import annotations

import argparse
import sys
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
from sglang_misa.policy import STOCK, rest_of_gate
from sglang_misa.policy_file import LayerPolicy, ModelIdentity, PolicyFile
from sglang_misa.refusal import Refusal
from sglang_misa.text_tables import ranges, table
from sglang_misa.validation import validated

REFUSED, INTERRUPTED = 2, 130
MODEL = "model"  # instead of a table of costs
GATED: dict[Phase, SelectionPolicy] = {"prefill": PRESETS["fast"].prefill, "decode": PRESETS["faithful"].decode}
Chosen = dict[int, dict[Phase, Point]]


@dataclass(frozen=True)
class Header:
    """What a dump tells before its tensors are read."""

    model: ModelIdentity
    layer: int
    keys: int
    rows: int

    @classmethod
    def read(cls, path: Path) -> Header:
        """The header of a file. Raises ConfigError for one that is no dump."""
        try:
            with safe_open(path, "pt") as file:
                facts = file.metadata() or {}
                keys, rows = (file.get_slice(name).get_shape()[0] for name in ("index_k", "index_q"))
            return cls(ModelIdentity.model_validate_json(facts["model"]), int(facts["layer"]), keys, rows)
        except (OSError, LookupError, ValueError, ValidationError, SafetensorError) as error:
            raise ConfigError(
                [f"FILE: expected what --misa-dump writes, got {path} ({error!r}); dump it again"]
            ) from None


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
        for each in sorted(dumped, key=lambda each: each.path):
            header = Header.read(each.path)
            models.setdefault(header.model, each.path)
            layers.setdefault(header.layer, []).append(each)
        if len(models) != 1:
            listed = ", ".join(map(str, models.values())) or "no file"
            raise ConfigError([f"FILE: expected dumps of one model, got {listed}; give those of one"])
        (model,) = models
        if beyond := sorted(layers.keys() - set(range(model.layers))):
            raise ConfigError(
                [f"FILE: expected layers 0 to {model.layers - 1} of this model, got {beyond[0]}; dump it again"]
            )
        return cls(model, layers)


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
    gates = {phase: validated(SelectionPolicy, _gates(phase, given), phase, names) for phase in PHASES}
    dumps, length, costs = _judged(given, _dumped(given))
    found: dict[int, dict[Phase, list[Point]]] = {}
    for layer, each in sorted(dumps.layers.items()):
        settings = {"length": length, "rows": given.rows, "device": given.device}
        found[layer] = choice.points(each, dumps.model, costs, gates, **settings)
        print(f"layer {layer}: {len(each)} files", file=sys.stderr, flush=True)
    bare = {phase: _unmeasured(found, phase) for phase in PHASES}
    if all(layers == [*found] for layers in bare.values()):
        raise ConfigError([f"FILE: expected {_why_bare(phase, costs, dumps.model, gates)}" for phase in PHASES])
    chosen = _chosen(found, given.target)
    file = _policy_file(dumps.model, chosen, given, length)
    ConfigError.raise_if(file.problems())
    with given.out.open("x") as stream:
        stream.write(file.model_dump_json(indent=1, exclude_defaults=True) + "\n")
    print("\n".join(_told(dumps.model, chosen, costs, given, length)))
    for phase, layers in bare.items():
        if layers:
            print(f"DSA in {phase} of layers {ranges(layers)}: expected {_why_bare(phase, costs, dumps.model, gates)}")
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
        before = _in(given.dump)
        answer = prompts.ask(given.server, number, text, given.new_tokens, key)
        files = _new(given.dump, before)
        own = [path for path, header in files.items() if header.keys == answer.tokens]  # others may ask it too
        if files and not own:
            keys = ", ".join(map(str, sorted({header.keys for header in files.values()})))
            raise ConfigError(
                [
                    f"--server: expected prompt_tokens of prompt {number} to be the keys dumped of it, {keys}, got "
                    f"{answer.tokens}; ask the server itself, without a proxy"
                ]
            )
        first = not found
        found += map(Dumped, own)
        if own and first:
            _judged(given, found)  # by the model that the first dump tells, before more is sent
        before = _in(given.dump)
        tokens = prompts.ask(given.server, number, text + answer.text, 1, key).tokens
        answers = {path: header for path, header in _new(given.dump, before).items() if header.keys == tokens}
        found += [Dumped(path, answer.tokens) for path in answers]
        _tell(number, answer.tokens, [files[path].rows for path in own], [each.rows for each in answers.values()])
    count = sum(each.answer is not None for each in found)
    if not 0 < count < len(found):
        raise ConfigError(
            [
                f"--dump: expected new files of prompts and of answers in {given.dump}, got {len(found) - count} and "
                f"{count}; start the server with it as its --misa-dump, "
                "raise --misa-dump-gib there, or send prompts longer than the model's top-k"
            ]
        )
    return found


def _in(folder: Path) -> set[Path]:
    return set(folder.glob("*.safetensors"))


def _new(folder: Path, before: set[Path]) -> dict[Path, Header]:
    return {path: Header.read(path) for path in sorted(_in(folder) - before)}


def _tell(number: int, tokens: int, prompt: Sequence[int], answer: Sequence[int]) -> None:
    """How many rows were dumped of a prompt in each layer, and of it with its answer."""
    rows = [max(each, default=0) for each in (prompt, answer)]
    cached = ": most of it was in the server's cache, which POST /flush_cache empties" if rows[0] == 1 else ""
    print(f"prompt {number}: {tokens} tokens, {rows[0]} and {rows[1]} rows{cached}", file=sys.stderr, flush=True)


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


def _unmeasured(found: Mapping[int, Mapping[Phase, Sequence[Point]]], phase: Phase) -> list[int]:
    """Layers in which DSA alone is a choice."""
    return [layer for layer, each in found.items() if all(point.policy in choice.DSA for point in each[phase])]


def _why_bare(phase: Phase, costs: Costs, model: ModelIdentity, gates: Mapping[Phase, SelectionPolicy]) -> str:
    """The end of a sentence for layers in which nothing could be measured in `phase`."""
    if not any(of == phase for of, _ in choice.policies(costs, model)):
        return (
            f"a policy of {phase} that the model can have and that was measured at the length of --costs, got none; "
            "measure one with python -m sglang_misa.bench.kernels, or ask for --costs model"
        )
    return (
        f"{choice.LEAST} rows or more of {phase} that see more than --min-len {gates[phase].min_len} keys, got fewer; "
        "lower it, send longer prompts, or dump more rows"
    )


def _chosen(found: Mapping[int, Mapping[Phase, Sequence[Point]]], target: float) -> Chosen:
    """The choice of each layer. Pages have sketches of one width: the one that costs least in all layers."""
    prefill = {layer: choice.choose(each["prefill"], target) for layer, each in found.items()}
    decodes = [
        {
            layer: choice.choose([point for point in each["decode"] if point.policy.sketch in (None, width)], target)
            for layer, each in found.items()
        }
        for width in selection.BITS
    ]
    decode = min(decodes, key=lambda each: (sum(p.cost for p in each.values()), -sum(p.recall for p in each.values())))
    return {layer: {"prefill": prefill[layer], "decode": decode[layer]} for layer in found}


def _policy_file(model: ModelIdentity, chosen: Chosen, given: argparse.Namespace, length: int) -> PolicyFile:
    layers = {str(layer): LayerPolicy() for layer in range(model.layers)}
    for layer, points in chosen.items():
        gated = {
            phase: point.policy.model_copy(update=_gates(phase, given)) if point.policy.active else STOCK
            for phase, point in points.items()
        }
        recall = {phase: point.told() for phase, point in points.items() if point.policy.active}
        layers[str(layer)] = LayerPolicy(**gated, recall=recall)
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
    rows = [
        (layer, phase, point.policy.label, f"{point.cost:.3f}", f"{point.recall:.4f}", f"{held:.4f}", point.rows)
        for layer, points in chosen.items()
        for phase, point in points.items()
        if (held := point.told().held_out) is not None
    ]
    yield table([("layer", "phase", "policy", "cost", "recall", "held out", "rows"), *rows])
    yield f"\nCost over stock's: {costs.source}. Target {given.target:g} at {length} keys: {given.out}"
    if under := [f"{phase} of layer {layer}" for layer, phase, *_, held, _ in rows if float(held) < given.target]:
        yield f"Under the target on the rows that were held out: {', '.join(under)}"
    without = [layer for layer in range(model.layers) if layer not in chosen]
    if without:
        yield f"Stock DSA, as there is no dump of them: layers {ranges(without)}"


if __name__ == "__main__":
    sys.exit(main())
