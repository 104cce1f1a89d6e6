"""Prove that a running server selects by its policies: python examples/prove_it_is_on.py URL [--decode].

Sends a prompt over the length gates and prints which selections its indexer calls went to. A decode policy that wants
steps of many rows, or of many tokens, is tried with --decode alone, which sends so many prompts of that length at once.
Exit status 0 where every phase that was tried used its policy, 1 where one did not, 2 where no server told.
"""

from __future__ import annotations

import argparse
import random
import sys
import urllib.error
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sglang_misa import http_request, key_mask, status
from sglang_misa.config import PHASES
from sglang_misa.refusal import Refusal

TIMEOUT = 600.0  # seconds: a long gate takes a long prompt
ROWS = 256  # of a prompt past prefill's gate: few of them, and a prompt's last, are not the policy's


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url", help="such as http://127.0.0.1:30000")
    parser.add_argument("--key-file", help="a file with the server's API key")
    parser.add_argument("--decode", action="store_true", help="send as many long prompts at once as decode wants")
    given = parser.parse_args()
    key = None if given.key_file is None else key_mask.read("--key-file", given.key_file)
    (before, *_) = status.fetch(given.url, key)
    if not before["enabled"]:
        print("sglang-misa is off here: start the server with a preset, as in --misa-preset fast")
        return 1
    rows, tokens = before["min_rows"], before["min_tokens"]
    past = {"prefill": ROWS, "decode": max(1, -(-tokens // rows))}  # the gate, of each prompt
    lengths = {phase: gate + past[phase] for phase, gate in before["min_len"].items()}  # without what is stock's always
    tried = [phase for phase in lengths if phase == "prefill" or given.decode or (rows, tokens) == (1, 0)]
    prompts, length = (rows if "decode" in tried else 1), max((lengths[phase] for phase in tried), default=1)
    with ThreadPoolExecutor(prompts) as pool:
        list(pool.map(lambda _: _send(given.url, key, length), range(prompts)))
    (after, *_) = status.fetch(given.url, key)

    proven = True
    for phase in PHASES:
        policy = after["policy"][phase]
        if phase not in tried:
            wants = "stock always"
            if phase in lengths:
                wants = f"not tried, as it wants steps such as of {rows} rows of {lengths[phase]} tokens: add --decode"
            print(f"{phase}: {policy}: {wants}")
            continue
        counts = [("calls", phase)] if phase == "prefill" else [("calls", phase), ("replays",)]
        grown = {name: more for path in counts for name, more in _grown(before, after, path).items()}
        used = any(grown.get(name, 0) for name in policy.split("|") if name != "dsa")  # of a policy file: several
        proven &= used
        print(f"{phase}: {policy}: {'proven' if used else 'NOT USED'}; of {length} tokens, calls by {grown}")
    return 0 if proven else 1


def _send(url: str, key: str | None, length: int) -> None:
    """A prompt of random ids, so that no cached prefix shortens what is new; low ones, which every vocabulary has."""
    body = {
        "input_ids": [random.randrange(3, 250) for _ in range(length)],
        "sampling_params": {"max_new_tokens": 64, "ignore_eos": True},  # so that prompts sent together decode together
    }
    try:
        http_request.ask(f"{url.rstrip('/')}/generate", key, TIMEOUT, body)
    except urllib.error.HTTPError as error:
        wanted = f"URL: expected an answer to a prompt of {length} tokens, which passes the gate, got {error.code}"
        way_out = "raise --context-length, or lower --misa-prefill-min-len"
        raise status.StatusError([f"{wanted}: {http_request.said(error)}; {way_out}"]) from None


def _grown(before: Mapping[str, Any], after: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, int]:
    """By how much each count at `path` grew."""
    for name in path:
        before, after = before[name], after[name]
    return {name: count - before.get(name, 0) for name, count in after.items() if count > before.get(name, 0)}


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (Refusal, OSError) as error:  # no key, or no server that tells
        print(error, file=sys.stderr)
        sys.exit(2)
    except (KeyError, TypeError, AttributeError) as error:
        print(status.of_another_version(error), file=sys.stderr)
        sys.exit(2)
