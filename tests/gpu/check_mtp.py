"""On a CUDA machine: speculative decoding (multi-token prediction) must not change what a server generates.

    python tests/gpu/check_mtp.py --out DIR [--arms stock misa-hisa]

Two servers an arm, one of them with a draft layer. Verification is greedy, so whatever is drafted, the tokens are the
target's: both servers give the same until two logits nearly tie, as they multiply matrices of other shapes. The weights
are random, so nearly every draft is refused, and its keys are written over by the next step.
Fails when most answers part early, when nothing was verified, or when steps ran on the wrong side of the length gate.
"""

from __future__ import annotations

import argparse
import pathlib
import signal
import sys
from dataclasses import replace

import numpy as np
from check_server import ARMS, GATED
from gpu_server import SHAPE, Server, ask, common_prefix, decode_steps, stop

DRAFTS = (  # SGLang's own choice for DeepSeek models
    "--speculative-algorithm EAGLE --speculative-num-steps 3 --speculative-eagle-topk 1 "
    "--speculative-num-draft-tokens 4"
)
LENGTHS = (4096, 40960)  # on both sides of the gate
TOGETHER, NEW_TOKENS = 4, 16  # prompts in a message
AGREE = 4  # leading tokens in which an answer must agree, in half of the answers


def compare(name: str, plain: Server, drafting: Server, length: int) -> list[str]:
    """What was wrong with the answers to prompts of `length` tokens, with drafts and without."""
    rng = np.random.default_rng(length)
    prompts = [rng.integers(2, SHAPE.vocab, length).tolist() for _ in range(TOGETHER)]
    expected = ask(plain, prompts, NEW_TOKENS, tail=False)
    before = decode_steps(drafting)
    answers = ask(drafting, prompts, NEW_TOKENS, tail=False)
    sides = {path for path, count in decode_steps(drafting).items() if count > before.get(path, 0)}

    same = [common_prefix(a.output_ids, b.output_ids) for a, b in zip(expected, answers, strict=True)]
    verified = [answer.verified for answer in answers]
    print(
        f"{name:12} {length:7d} same {same} of {NEW_TOKENS} tokens, {verified} steps verified, ran {sides}", flush=True
    )
    problems = []
    if not all(verified):
        problems.append(f"{name} at {length}: expected verified steps in every request, got {verified}")
    if 2 * sum(count >= AGREE for count in same) < TOGETHER:
        problems.append(f"{name} at {length}: expected {AGREE} equal tokens in half of the answers, got {same}")
    wanted = {"dsa" if length + NEW_TOKENS < GATED["decode"]["min_len"] else "hisa"}
    if ARMS[name] is not None and sides != wanted:
        problems.append(f"{name} at {length}: expected decode steps by {wanted}, got {sides}")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--arms", nargs="+", default=["stock", "misa-hisa"], choices=["stock", "misa-hisa", "hisa"])
    parser.add_argument("--port", type=int, default=31100)
    options, extra = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the servers are stopped too
    options.out.mkdir(parents=True, exist_ok=True)
    shape = replace(SHAPE, draft_layers=1)
    servers: dict[str, Server] = {}
    failures = []
    try:
        for arm in options.arms:
            for name, flags in ((arm, []), (f"{arm}-mtp", DRAFTS.split())):
                log, port = options.out / f"{name}.log", options.port + len(servers)
                servers[name] = Server(ARMS[arm], log, port, flags + extra, shape=shape)
        for name, server in servers.items():
            print(f"{name} is ready after {server.wait():.0f} s more", flush=True)
            ask(server, [[5] * 3000], 4, tail=False)
        for arm in options.arms:
            for length in LENGTHS:
                failures += compare(arm, servers[arm], servers[f"{arm}-mtp"], length)
            print(arm, servers[f"{arm}-mtp"].misa(), flush=True)
    except (OSError, RuntimeError) as error:
        failures.append(str(error))
    finally:
        stop(servers.values())
    for failure in failures:
        print("FAILED", failure, file=sys.stderr)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
