"""Checks, by a server's own status, that it runs the token selection that its arm claims, and how often."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from sglang_misa.config import PHASES, PRESETS
from sglang_misa.kernels.layout import Router

TABLES = ("policy", "calls", "replays", "min_len")  # entries of a rank
STOCK = {"off", "stock", "dsa"}  # names of SGLang's own selection
PARTS = {*("misa", "hisa", "exact", "dsa", "residual", "sketch1", "sketch2", "hier"), *get_args(Router)}  # of a name


def ranks_of(info: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The `misa` entry of each rank in /server_info; empty when the plugin is not there."""
    ranks = [s["misa"] for s in _states(info) if isinstance(s, Mapping) and isinstance(s.get("misa"), Mapping)]
    return [{**rank, **{table: _table(rank, table) for table in TABLES}} for rank in ranks]


def _states(info: Mapping[str, Any]) -> list[Any]:
    states = info.get("internal_states")
    return states if isinstance(states, list) else []


def _table(rank: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An entry that must be a table; empty where a server that is not ours says something else."""
    told = rank.get(name)
    return told if isinstance(told, Mapping) else {}


def known(expect: str) -> bool:
    """Whether `expect` names stock selection or a preset, or can be the name of a policy, or of several by layer."""
    return expect in STOCK or expect in PRESETS or PARTS.issuperset(re.split("[-+|]", expect))


def problem(expect: str, info: Mapping[str, Any]) -> str | None:
    """Why a server does not run the token selection that its arm claims, or None when it does.

    `expect`: off or dsa = stock selection; otherwise a preset of the launcher (misa-hisa, fast, …), or the name of the
    policy of one phase.
    """
    on = [r for r in ranks_of(info) if r.get("enabled")]
    if expect in STOCK:
        names = {name for r in on for name in _policies(r).values()} - {"dsa"}
        return f"expected stock selection, got {', '.join(sorted(names))}" if names else None
    states = _states(info)
    if not on or len(on) != len(states):
        return (
            f"expected {expect} in every rank, got it enabled in {len(on)} of {len(states)} (is the plugin installed?)"
        )
    wrong = [_policies(r) for r in on if not _phases(expect, _policies(r))]
    told = " and ".join(f"{name} in {phase}" for phase, name in wrong[0].items()) if wrong else ""
    return f"expected {expect}, got {f'the policies {told}' if told else 'no policies'}" if wrong else None


def calls(info: Mapping[str, Any]) -> dict[str, int]:
    """Indexer calls and decode graphs replayed by path since the start, summed over ranks: `prefill.misa` → n."""
    total: dict[str, int] = {}
    for rank in ranks_of(info):
        for path, count in _leaves({**rank["calls"], "replay": rank["replays"]}, ()):
            total[path] = total.get(path, 0) + count
    return total


def routed(expect: str, info: Mapping[str, Any], before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    """Phases that `expect` names → calls between two readings of `calls` that took its own path, not stock's.

    A CUDA graph counts at capture, not when it runs: a captured path stands for replays only where no replay is counted
    and the policy has no gate, so that every decode step takes it.
    """
    rank = next(iter(ranks_of(info)), {})
    gates = rank.get("min_len", {})
    ungated = not rank.get("min_tokens") and rank.get("min_rows", 1) <= 1
    found = dict.fromkeys(sorted(_phases(expect, _policies(rank))), 0)
    for path, count in after.items():
        head, _, name = path.partition(".")
        phase = "decode" if head == "replay" else head
        if phase not in found or STOCK & set(re.split("[.:]", path)):
            continue
        if not name.startswith("captured:"):
            found[phase] += count - before.get(path, 0)
        elif gates.get(phase) == 0 and ungated and not rank.get("replays"):
            found[phase] += count
    return found


def _policies(rank: Mapping[str, Any]) -> dict[str, str]:
    """Phase → name of its policy."""
    return {phase: str(name) for phase, name in rank.get("policy", {}).items()}


def _phases(expect: str, policies: Mapping[str, str]) -> set[str]:
    """The phases in which `policies` are what `expect` names beyond stock; empty when they are not."""
    preset = PRESETS.get(expect)
    if preset is not None and policies == {phase: preset.policy(phase).name for phase in PHASES}:
        return {phase for phase in PHASES if preset.policy(phase).active}
    return {phase for phase, name in policies.items() if name == expect}


def _leaves(node: Any, path: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, (*path, str(key)))
    elif isinstance(node, int) and path:
        yield ".".join(path), node
