"""Prove that a running server selects by its policies: python examples/prove_it_is_on.py URL [--key-file FILE].

Sends one prompt over the length gate of prefill and one token of decode, and prints which selections its indexer calls
went to. Exit status 0 where every phase that has a policy used it.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Mapping
from typing import Any

from sglang_misa import asking, key_mask, status
from sglang_misa.config import PHASES
from sglang_misa.refusal import Refusal

TIMEOUT = 600.0  # seconds: a long gate takes a long prompt


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url", help="such as http://127.0.0.1:30000")
    parser.add_argument("--key-file", help="a file with the server's API key")
    given = parser.parse_args()
    key = None if given.key_file is None else key_mask.read("--key-file", given.key_file)
    (before, *_) = status.fetch(given.url, key)
    if not before["enabled"]:
        print("sglang-misa is off here: start the server with a preset, as in --misa-preset fast")
        return 1
    gates = [gate for gate in before["min_len"].values() if gate is not None]
    # Random ids, so that no cached prefix shortens what is new; low ones, which every vocabulary has.
    prompt = [random.randrange(3, 250) for _ in range(max(gates, default=0) + 1)]
    body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}
    asking.ask(f"{given.url.rstrip('/')}/generate", key, TIMEOUT, body)
    (after, *_) = status.fetch(given.url, key)

    proven = True
    for phase in PHASES:
        counts = [("calls", phase)] if phase == "prefill" else [("calls", phase), ("replays",)]
        grown = {name: more for path in counts for name, more in _grown(before, after, path).items()}
        policy = after["policy"][phase]
        used = policy == "dsa" or grown.get(policy, 0) > 0
        proven &= used
        print(f"{phase}: {policy}: {'proven' if used else 'NOT USED'}; of {len(prompt)} tokens, calls by {grown}")
    return 0 if proven else 1


def _grown(before: Mapping[str, Any], after: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, int]:
    """By how much each count at `path` grew."""
    for name in path:
        before, after = before[name], after[name]
    return {name: count - before.get(name, 0) for name, count in after.items() if count > before.get(name, 0)}


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (Refusal, OSError) as error:  # no key, or no server that tells
        sys.exit(str(error))
