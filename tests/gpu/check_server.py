"""On CUDA GPUs: a real server with the plugin against stock, selection by selection, through HTTP.

    python tests/gpu/check_server.py --out DIR [--arms stock all-heads ...] [--lengths 4096 32768 131072] [--tp 2]

Starts one server an arm, all at once, on a seeded random model of DeepSeek-V3.2 shapes (4 layers), sends each the same
prompts in turn with `return_indexer_topk`, and prints the overlap of each arm's sets with stock's: the rows of the last
prefill chunk and the decode rows that ran in CUDA graphs. Random weights say nothing about recall on a real model.
Fails when an arm that must equal another does not, when an arm did not run its policy, when the decode steps of a
request ran on the wrong side of the length gate, when tensor-parallel ranks parted, or, with `--exact-topk`, when a
request selects otherwise in one extend call with others than alone (`shared_extends`), or from the radix cache than
cold. Other arguments go to SGLang: `--cuda-graph-backend-decode disabled` decodes eagerly.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import signal
import sys
import time
from typing import Any

import numpy as np
import shared_extends
from gpu_server import EQUAL, PREFILL_GRAPHS, SHAPE, Answer, Server, ask, common_prefix, decode_steps, overlaps, stop

from sglang_misa.kernels.layout import PAGE

NEW_TOKENS = 8

ALL_HEADS = {"heads": 64, "min_len": 0}
# SGLang's own top-k kernel is approximate where scores crowd together: compare beneath torch's.
EXACT_TOPK = ["--dsa-topk-backend", "torch"]
EXACT_ENV = {"SGLANG_DSA_FUSE_TOPK": "0"}
PAPER = {"heads": 8, "min_len": 0}
AUDIT = {"rows": 8, "every": 64}  # the first call of a layer, in the warm-up, then seldom
BLOCKS = {"blocks": 64, "block_size": 128}
GATED = {"prefill": PAPER | {"min_len": 8192}, "decode": BLOCKS | {"min_len": 32768}}
HISA = GATED | {"prefill": BLOCKS | {"min_len": 8192}}  # as many tokens as 64 blocks hold: beyond it some are dropped
ARMS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "all-heads": {"prefill": ALL_HEADS, "decode": ALL_HEADS, "backend": "torch"},
    "misa-torch": {"prefill": PAPER, "decode": PAPER, "backend": "torch", "audit": AUDIT},
    "misa": {"prefill": PAPER, "audit": AUDIT},
    "misa-hier": {"prefill": PAPER | {"candidates": 8192}, "audit": AUDIT},
    "misa-hisa": GATED | {"audit": AUDIT},
    "misa-hisa-torch": GATED | {"backend": "torch"},
    "hisa": HISA | {"audit": AUDIT},
    "hisa-torch": HISA | {"backend": "torch"},
}
# Arm, the arm whose sets on layer 0 it must select beneath an exact top-k, and in which phases. Kernels and reference
# add in different orders, so they may part where scores nearly tie. A block that goes either way is some 1/64 of one
# row's set, and EQUAL bears it in one row of 16. A head that goes either way changes many tokens of its row, so prefill
# by routed heads is left to `check_prefill`.
MUST_EQUAL = (
    ("all-heads", "stock", ("prefill", "decode")),
    ("misa-hisa", "misa-hisa-torch", ("decode",)),
    ("hisa", "hisa-torch", ("prefill", "decode")),
)


def wrong_side(arm: str, length: int, before: dict[str, int], after: dict[str, int]) -> list[str]:
    """A sentence when a lone request's decode steps were not all on their side of the gate."""
    steps = {path: after[path] - before.get(path, 0) for path in after}
    wanted = "dsa" if length + NEW_TOKENS < GATED["decode"]["min_len"] else "hisa"
    if steps.get(wanted, 0) >= NEW_TOKENS - 1 and not any(n for path, n in steps.items() if path != wanted):
        return []
    return [f"{arm} at {length}: expected {NEW_TOKENS - 1} or more decode steps, all {wanted}, got {steps}"]


def graph_cost(server: Server) -> list[str]:
    """What SGLang logged of capturing graphs: seconds and memory."""
    return [line.split("] ", 1)[-1] for line in server.log.read_text().splitlines() if "CUDA graph end" in line]


def timed(server: Server, ids: list[int], tail: bool) -> tuple[Answer, dict[str, Any]]:
    """The answer to one prompt, and what it cost."""
    start = time.monotonic()
    (answer,) = ask(server, [ids], NEW_TOKENS, tail=tail)
    return answer, {"seconds": time.monotonic() - start, "cached": answer.cached, "output_ids": answer.output_ids}


def idle(arm: str, status: dict[str, Any]) -> list[str]:
    """A sentence when MISA is not live in an arm, or its prefill policy never ran."""
    if not status.get("enabled"):
        return [f"{arm}: MISA is not live: {status}"]
    policy, calls = status["policy"]["prefill"], status["calls"]["prefill"]
    return [] if calls.get(policy) else [f"{arm}: expected {policy} to run in prefill, got calls {calls}"]


class Run:
    """What the arms answered, and what was wrong with it."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.arms = options, options.arms
        self.record: dict[str, Any] = {arm: {"requests": []} for arm in self.arms}
        self.seen: dict[str, list[np.ndarray]] = {arm: [] for arm in self.arms}
        self.failures: list[str] = []
        rng = np.random.default_rng(0)
        lengths = [length for length in options.lengths for _ in range(options.repeats)]
        self.prompts = [rng.integers(2, SHAPE.vocab, length).tolist() for length in lengths]

    @property
    def selects(self) -> bool:
        return not self.options.no_selections

    def warm_up(self, servers: dict[str, Server]) -> None:
        for arm, server in servers.items():
            self.record[arm]["ready_s"] = round(server.wait(), 1)
            print(f"{arm} is ready after {self.record[arm]['ready_s']} s more", *graph_cost(server), flush=True)
            for length in (3000, 9000):
                ask(server, [[5] * length], 4, tail=False)

    def send(self, servers: dict[str, Server]) -> None:
        """Every prompt to every arm, the last one twice."""
        for i, ids in enumerate(self.prompts):
            for arm in self.arms[:: 1 if i % 2 else -1]:  # A B, B A, ...: no arm is always the warmer one
                before = decode_steps(servers[arm])
                answer, cost = timed(servers[arm], ids, self.selects)
                if (ARMS[arm] or {}).get("decode") == GATED["decode"]:
                    self.failures += wrong_side(arm, len(ids), before, decode_steps(servers[arm]))
                self.seen[arm].append(answer.selected)
                self.record[arm]["requests"].append({"length": len(ids), **cost})
                print(f"{arm:15} {len(ids):7d} {cost['seconds']:.3f} s", flush=True)
        for arm, server in servers.items():
            again, self.record[arm]["again"] = timed(server, self.prompts[-1], self.selects)
            if self.selects:
                rows = slice(1 - NEW_TOKENS - PAGE, 1 - NEW_TOKENS)  # prompt rows: the last page's are new again
                again_overlap = overlaps(self.seen[arm][-1][rows], again.selected[rows])
                self.record[arm]["again_overlap"] = again_overlap
                print(f"{arm:15} {len(self.prompts[-1]):7d} again, from the radix cache: {again_overlap}", flush=True)
                if self.options.exact_topk and not again_overlap[0] >= EQUAL:
                    self.failures.append(f"{arm}: expected the same sets after a radix hit, got {again_overlap}")

    def share_extends(self, servers: dict[str, Server]) -> None:
        for arm, server in servers.items():
            problems, self.record[arm]["shared_extends"] = shared_extends.check(
                server, graphs=self.options.prefill_graphs
            )
            self.failures += problems
            print(f"{arm:15} in shared extend calls: {self.record[arm]['shared_extends']}", flush=True)

    def ask_status(self, servers: dict[str, Server]) -> None:
        for arm, server in servers.items():
            status = self.record[arm]["status"] = server.misa()
            print(arm, json.dumps(status), flush=True)
            if ARMS[arm] is not None:
                self.failures += idle(arm, status)

    def overlap_with(self, arm: str, base: str) -> dict[int, dict[str, Any]]:
        """Mean overlap of `arm`'s sets with those of `base`, by layer, for each length's prefill and decode rows."""
        result = {}
        for i, (ours, theirs) in enumerate(zip(self.seen[arm], self.seen[base], strict=False)):
            outputs = (self.record[name]["requests"][i]["output_ids"] for name in (arm, base))
            decode_rows = NEW_TOKENS - 1  # row i reads output i: comparable while the outputs agree
            same, first = min(common_prefix(*outputs), decode_rows), len(theirs) - decode_rows
            rows_of = {"prefill": slice(0, first), "decode": slice(first, first + same)}
            result[len(self.prompts[i])] = {
                phase: overlaps(theirs[rows], ours[rows]) for phase, rows in rows_of.items()
            } | {"decode_rows": same}
        return result

    def compare(self) -> None:
        """Prints the overlaps with the first arm, and fails arms that had to equal another."""
        for arm in self.arms[1:]:
            found = self.record[arm]["overlap_with_" + self.arms[0]] = self.overlap_with(arm, self.arms[0])
            for length, result in found.items():
                print(f"{arm:15} {length:7d} prefill {result['prefill']} decode {result['decode']}", flush=True)
        for arm, base, phases in MUST_EQUAL:
            if not self.options.exact_topk or not {arm, base} <= set(self.arms):
                continue
            for length, result in self.overlap_with(arm, base).items():
                rows = result["decode_rows"]  # none where the outputs part at once
                lowest = min((result[phase][0] for phase in phases if phase != "decode" or rows), default=1.0)
                print(f"{arm} as {base}, {length}: layer 0 overlaps by {lowest}, {rows} decode rows", flush=True)
                if not lowest >= EQUAL:
                    self.failures.append(f"{arm} at {length}: expected {base}'s sets on layer 0, got overlap {result}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument(
        "--arms", nargs="+", default=["stock", "all-heads", "misa-hisa", "misa-hisa-torch"], choices=[*ARMS]
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 32768, 131072])
    parser.add_argument("--port", type=int, default=31000)
    parser.add_argument("--tp", type=int, default=1, help="GPUs of each server, as tensor-parallel ranks")
    parser.add_argument("--no-selections", action="store_true", help="time cold prompts only")
    parser.add_argument("--repeats", type=int, default=1, help="cold prompts a length, each with its own tokens")
    parser.add_argument("--exact-topk", action="store_true", help="finish with torch's top-k, in stock and ours alike")
    parser.add_argument("--prefill-graphs", action="store_true", help="short extends replay SGLang's prefill graphs")
    options, extra = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the servers are stopped too
    run = Run(options)
    if options.prefill_graphs:
        extra = PREFILL_GRAPHS.split() + extra
    if options.exact_topk:
        extra += EXACT_TOPK
        os.environ.update(EXACT_ENV)
    if run.selects:
        extra += ["--enable-return-indexer-topk"]
    options.out.mkdir(parents=True, exist_ok=True)
    servers: dict[str, Server] = {}
    try:
        for i, arm in enumerate(run.arms):
            servers[arm] = Server(ARMS[arm], options.out / f"{arm}.log", options.port + i, extra, ranks=options.tp)
        run.warm_up(servers)
        run.send(servers)
        if run.selects and options.exact_topk:  # whose selections are positions: slots depend on what came before
            run.share_extends(servers)
        run.ask_status(servers)
    except (OSError, RuntimeError) as error:
        logs = "\n".join(f"{arm}: {server.log.read_text()[-3000:]}" for arm, server in servers.items())
        run.failures.append(f"{error}\n{logs}")
    finally:
        stop(servers.values())
    if run.selects:
        run.compare()
    if run.selects and options.tp > 1:
        run.failures += [problem for server in servers.values() for problem in server.rank_problems()]
    (options.out / "server.json").write_text(json.dumps(run.record, indent=1, default=str))
    for failure in run.failures:
        print("FAILED", failure, file=sys.stderr)
    return bool(run.failures)


if __name__ == "__main__":
    sys.exit(main())
