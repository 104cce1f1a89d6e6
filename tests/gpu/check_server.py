"""On a CUDA machine: a real server with the plugin against stock, selection by selection, through HTTP.

    python tests/gpu/check_server.py --out DIR [--arms stock all-heads ...] [--lengths 4096 32768 131072]

Starts one server an arm, all at once, on a seeded random model of DeepSeek-V3.2 shapes (4 layers), sends each the same
prompts in turn with `return_indexer_topk`, and prints the overlap of each arm's sets with stock's: the rows of the last
prefill chunk and the decode rows that ran in CUDA graphs. Random weights say nothing about recall on a real model.
Fails when an arm that must equal another does not, when an arm did not run its policy, or when the decode steps of a
request replayed graphs of the wrong side of the length gate.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import urllib.request
from typing import Any

import numpy as np

from sglang_misa import demo_model

HERE = pathlib.Path(__file__).parent
TOPK, LAYERS, NEW_TOKENS, TAIL = 2048, 4, 8, 128
EQUAL = 0.999  # DeepGEMM multiplies fp8 with fewer accumulator bits than fp32: sets overlap by 0.9993 or more

# True indexer, attention and hidden sizes of one layer stack; the vocabulary is wide so that keys do not repeat.
SHAPE = demo_model.Shape(
    hidden=2048,
    layers=LAYERS,
    heads=64,
    q_rank=1536,
    intermediate=4096,
    dense_layers=LAYERS,
    index_topk=TOPK,
    vocab=32000,
)

ALL_HEADS = {"heads": 64, "min_len": 0}
# SGLang's own top-k kernel is approximate where scores crowd together: compare beneath torch's.
EXACT_TOPK = ["--dsa-topk-backend", "torch"]
EXACT_ENV = {"SGLANG_DSA_FUSE_TOPK": "0"}
PAPER = {"heads": 8, "min_len": 0}
AUDIT = {"rows": 8, "every": 64}  # the first call of a layer, in the warm-up, then seldom
GATED = {
    "prefill": PAPER | {"min_len": 8192},
    "decode": {"blocks": 64, "block_size": 128, "min_len": 32768},
}
ARMS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "all-heads": {"prefill": ALL_HEADS, "decode": ALL_HEADS, "backend": "torch"},
    "misa-torch": {"prefill": PAPER, "decode": PAPER, "backend": "torch", "audit": AUDIT},
    "misa": {"prefill": PAPER, "audit": AUDIT},
    "misa-hier": {"prefill": PAPER | {"candidates": 8192}, "audit": AUDIT},
    "misa-hisa": GATED | {"audit": AUDIT},
    "misa-hisa-torch": GATED | {"backend": "torch"},
}
# Arm, the arm whose sets on layer 0 it must select beneath an exact top-k, and in which phases. In prefill the kernels
# may part from the reference where routed heads nearly tie.
MUST_EQUAL = (
    ("all-heads", "stock", ("prefill", "decode")),
    ("misa-hisa", "misa-hisa-torch", ("decode",)),
)


def post(url: str, body: dict[str, Any], timeout: float = 600) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return json.load(answer)


def get(url: str, timeout: float = 30) -> Any:
    with urllib.request.urlopen(url, timeout=timeout) as answer:
        return json.loads(answer.read() or "null")


class Server:
    """One SGLang server in a process group of its own."""

    def __init__(self, config: dict[str, Any] | None, log: pathlib.Path, port: int, extra: list[str]):
        model = demo_model.ensure(log.parent, SHAPE)
        env = os.environ | {"SELECTION_TAIL": str(TAIL), "SGLANG_DSA_PREFILL_DENSE_ATTN_KV_LEN_THRESHOLD": "0"}
        env.pop("SGLANG_MISA_CONFIG", None)
        if config is not None:
            env["SGLANG_MISA_CONFIG"] = json.dumps(config)
        command = f"""{sys.executable} {HERE / "serve_tail.py"} --model-path {model}
            --skip-tokenizer-init --host 127.0.0.1 --port {port} --context-length 140000 --mem-fraction-static 0.5
            --chunked-prefill-size 8192 --dsa-prefill-backend flashmla_sparse --dsa-decode-backend flashmla_sparse
            --kv-cache-dtype bfloat16 --grammar-backend none --sampling-backend pytorch --skip-server-warmup
            --disable-prefill-cuda-graph --cuda-graph-max-bs-decode 4 --max-running-requests 4
            --max-total-tokens 300032""".split()
        self.url, self.log = f"http://127.0.0.1:{port}", log
        with log.open("w") as sink:
            self.process = subprocess.Popen(command + extra, stdout=sink, stderr=sink, env=env, start_new_session=True)

    def wait(self, limit: float = 420) -> float:
        """Seconds to ready; raises with the end of the log when the server died or took too long."""
        start = time.monotonic()
        while time.monotonic() - start < limit:
            if self.process.poll() is not None:
                break
            try:
                get(self.url + "/health", timeout=2)
                return time.monotonic() - start
            except OSError:
                time.sleep(1)
        raise RuntimeError(f"the server did not come up; the end of {self.log}:\n{self.log.read_text()[-4000:]}")

    def stop(self) -> None:
        for signum in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, signum)
            except ProcessLookupError:
                return
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                continue


def replays(server: Server) -> dict[str, int]:
    """Decode graphs replayed so far by side of the length gate."""
    status = get(server.url + "/server_info")["internal_states"][0].get("misa") or {}
    return dict(status.get("replays", {}))


def wrong_side(arm: str, length: int, before: dict[str, int], after: dict[str, int]) -> list[str]:
    """A sentence when a lone request's decode steps did not all replay the graph of their side of the gate."""
    steps = {path: after.get(path, 0) - before.get(path, 0) for path in after}
    wanted = "dsa" if length + NEW_TOKENS < GATED["decode"]["min_len"] else "hisa"
    if steps.get(wanted, 0) >= NEW_TOKENS - 1 and not any(n for path, n in steps.items() if path != wanted):
        return []
    return [f"{arm} at {length}: expected {NEW_TOKENS - 1} or more decode steps, all {wanted}, got {steps}"]


def graph_cost(server: Server) -> list[str]:
    """What SGLang logged of capturing decode graphs: seconds and memory."""
    return [line.split("] ", 1)[-1] for line in server.log.read_text().splitlines() if "decode CUDA graph end" in line]


def selections(server: Server, ids: list[int], tail: bool) -> tuple[np.ndarray, dict[str, Any]]:
    """Selected ids int32 [rows, layers, 2048] of the request's last rows, and its timings."""
    body = {
        "input_ids": ids,
        "sampling_params": {"max_new_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True},
        "return_indexer_topk": tail,
    }
    start = time.monotonic()
    answer = post(server.url + "/generate", body)
    meta = answer["meta_info"]
    timing = {"seconds": time.monotonic() - start, "cached": meta["cached_tokens"], "output_ids": answer["output_ids"]}
    raw = base64.b64decode(meta["indexer_topk"]) if tail else b""
    return np.frombuffer(raw, dtype=np.int32).reshape(-1, LAYERS, TOPK), timing


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Mean |A∩B| / |A| over rows [rows, 2048], -1 left out."""
    shares = []
    for row_a, row_b in zip(a, b, strict=True):
        wanted = row_a[row_a >= 0]
        shares.append(np.isin(wanted, row_b).mean() if len(wanted) else 1.0)
    return float(np.mean(shares)) if shares else float("nan")


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many leading tokens agree."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument(
        "--arms", nargs="+", default=["stock", "all-heads", "misa-hisa", "misa-hisa-torch"], choices=[*ARMS]
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 32768, 131072])
    parser.add_argument("--port", type=int, default=31000)
    parser.add_argument("--no-selections", action="store_true", help="time cold prompts only")
    parser.add_argument("--repeats", type=int, default=1, help="cold prompts a length, each with its own tokens")
    parser.add_argument("--exact-topk", action="store_true", help="finish with torch's top-k, in stock and ours alike")
    options, extra = parser.parse_known_args()
    if options.exact_topk:
        extra += EXACT_TOPK
        os.environ.update(EXACT_ENV)
    options.out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    prompts = [(n, rng.integers(2, 32000, n).tolist()) for n in options.lengths for _ in range(options.repeats)]
    record: dict[str, Any] = {arm: {"requests": []} for arm in options.arms}
    seen: dict[str, list[np.ndarray]] = {arm: [] for arm in options.arms}
    failures = []
    if not options.no_selections:
        extra += ["--enable-return-indexer-topk"]
    servers: dict[str, Server] = {}
    try:
        for i, arm in enumerate(options.arms):
            servers[arm] = Server(ARMS[arm], options.out / f"{arm}.log", options.port + i, extra)
        for arm, server in servers.items():
            record[arm]["ready_s"] = round(server.wait(), 1)
            print(f"{arm} is ready after {record[arm]['ready_s']} s more", *graph_cost(server), flush=True)
            for length in (3000, 9000):
                post(server.url + "/generate", {"input_ids": [5] * length, "sampling_params": {"max_new_tokens": 4}})
        for i, (length, ids) in enumerate(prompts):
            for arm in options.arms[:: 1 if i % 2 else -1]:  # A B, B A, ...: no arm is always the warmer one
                before = replays(servers[arm])
                chosen, timing = selections(servers[arm], ids, not options.no_selections)
                if (ARMS[arm] or {}).get("decode") == GATED["decode"]:
                    failures += wrong_side(arm, length, before, replays(servers[arm]))
                seen[arm].append(chosen)
                record[arm]["requests"].append({"length": length, **timing})
                print(f"{arm:12} {length:7d} {timing['seconds']:.3f} s", flush=True)
        for arm, server in servers.items():
            again, record[arm]["again"] = selections(server, prompts[-1][1], not options.no_selections)
            if not options.no_selections:
                record[arm]["again_overlap_layer0"] = overlap(seen[arm][-1][-16:, 0], again[-16:, 0])
            status = record[arm]["status"] = get(server.url + "/server_info")["internal_states"][0].get("misa")
            print(arm, json.dumps(status), flush=True)
            if ARMS[arm] is not None and not (status and status["enabled"]):
                failures.append(f"{arm}: MISA is not live: {status}")
    except (OSError, RuntimeError) as error:
        logs = "\n".join(f"{arm}: {server.log.read_text()[-3000:]}" for arm, server in servers.items())
        failures.append(f"{error}\n{logs}")
    finally:
        for server in servers.values():
            server.stop()
    (options.out / "server.json").write_text(json.dumps(record, indent=1, default=str))

    def overlaps(arm: str, base: str) -> dict[int, dict[str, Any]]:
        """Mean overlap of `arm`'s sets with those of `base`, by layer, for each prompt's prefill and decode rows."""
        result = {}
        for i, (length, _) in enumerate(prompts[: len(seen[arm])]):
            ours, theirs = seen[arm][i], seen[base][i]
            outputs = (record[name]["requests"][i]["output_ids"] for name in (arm, base))
            decode_rows = NEW_TOKENS - 1  # row i reads output i: comparable while the outputs agree
            same, first = min(common_prefix(*outputs), decode_rows), len(theirs) - decode_rows
            rows_of = {"prefill": slice(0, first), "decode": slice(first, first + same)}
            result[length] = {
                phase: [round(overlap(theirs[rows, layer], ours[rows, layer]), 5) for layer in range(LAYERS)]
                for phase, rows in rows_of.items()
            } | {"decode_rows": same}
        return result

    for arm in [] if options.no_selections else options.arms[1:]:
        found = record[arm]["overlap_with_" + options.arms[0]] = overlaps(arm, options.arms[0])
        for length, result in found.items():
            print(f"{arm:12} {length:7d} prefill {result['prefill']} decode {result['decode']}", flush=True)
    for arm, base, phases in MUST_EQUAL:
        if options.no_selections or not options.exact_topk or not {arm, base} <= set(options.arms):
            continue
        for length, result in overlaps(arm, base).items():
            rows = result["decode_rows"]  # none where the outputs part at once
            lowest = min((result[phase][0] for phase in phases if phase != "decode" or rows), default=1.0)
            print(f"{arm} as {base}, {length}: layer 0 overlaps by {lowest}, {rows} decode rows", flush=True)
            if lowest < EQUAL:
                failures.append(f"{arm} at {length}: expected {base}'s sets on layer 0, got overlap {result}")
    (options.out / "server.json").write_text(json.dumps(record, indent=1, default=str))
    for failure in failures:
        print("FAILED", failure, file=sys.stderr)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
