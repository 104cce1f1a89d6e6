"""What a running server selects with: python -m sglang_misa.status URL [--json] [--key-file FILE].

Exit status 0 where every replica selects by its policies, 1 where one does not (also where layers, or all of decode,
are back on stock DSA for low recall), 2 where the server did not tell.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import urllib.error
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sglang_misa import __version__, key_mask
from sglang_misa.config import PHASES
from sglang_misa.http_request import ask
from sglang_misa.outlet import kept_stdout
from sglang_misa.refusal import Refusal
from sglang_misa.text_tables import ranges, table

TIMEOUT = 30.0  # seconds: SGLang answers between two steps
NOT_AS_ASKED, UNKNOWN = 1, 2  # exit statuses


class StatusError(Refusal):
    """A server that does not tell its status."""

    opening = "sglang-misa cannot read the server's status"


@kept_stdout()
def main(argv: Sequence[str]) -> int:
    """Print the status of every replica of a server; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sglang_misa.status", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url", metavar="URL", help="the server's address, such as http://127.0.0.1:30000")
    parser.add_argument("--json", action="store_true", help="print JSON, a list with one object a replica")
    parser.add_argument("--key-file", metavar="FILE", help="a file with the server's API key")
    given = parser.parse_args(argv)
    try:
        key = None if given.key_file is None else key_mask.read("--key-file", given.key_file)
        replicas = fetch(given.url, key)
        tables = _tables(replicas)
    except Refusal as error:
        print(error, file=sys.stderr)
        return UNKNOWN
    print(json.dumps(replicas, indent=1) if given.json else tables)
    as_asked = all(status["enabled"] and not status["unrouted"] and not _given_back(status) for status in replicas)
    return 0 if as_asked else NOT_AS_ASKED


def fetch(url: str, key: str | None) -> list[dict[str, Any]]:
    """The status of each data-parallel replica, {"enabled": False} without this package. Raises StatusError."""
    try:
        states = json.loads(ask(f"{url.rstrip('/')}/server_info", key, TIMEOUT))["internal_states"]
        replicas = [state.get("misa") or {"enabled": False} for state in states]
    except urllib.error.HTTPError as error:
        way_out = "add --key-file with the server's key" if error.code == 401 else "check the address"
        raise StatusError([f"URL: expected 200 from {url}, got {error.code} {error.reason}; {way_out}"]) from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise StatusError([f"URL: expected SGLang's /server_info at {url}, got no JSON; check the address"]) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise StatusError([f"URL: expected a server at {url}, got {error!s:.300}; check the address"]) from None
    except (KeyError, TypeError, AttributeError) as error:
        raise StatusError(
            [f"URL: expected SGLang's /server_info with internal_states at {url}, got {error!r}; check the address"]
        ) from None
    if not replicas:
        raise StatusError([f"URL: expected a replica or more at {url}, got none; wait until the server is ready"])
    return replicas


def _tables(replicas: Sequence[Mapping[str, Any]]) -> str:
    """The tables of all replicas. Raises StatusError for what another version may have said."""
    try:
        return "\n\n".join(map(text, replicas))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise of_another_version(error) from None


def of_another_version(error: Exception) -> StatusError:
    """What to raise for an `error` in reading a status."""
    return StatusError(
        [f"URL: expected the status of sglang-misa {__version__}, got another ({error!r}); use the server's"]
    )


def text(status: Mapping[str, Any]) -> str:
    """The status of one replica as tables."""
    if not status["enabled"]:
        return "sglang-misa is off: stock DSA selects in both phases"
    return "\n\n".join(_paragraphs(status))


def _paragraphs(status: Mapping[str, Any]) -> Iterator[str]:
    verified = "" if status["verified"] else " (not verified on this device)"
    preset = status["preset"] or "none by name"
    yield (
        f"sglang-misa {status['version']} on SGLang {status['sglang']}{verified}, preset: {preset}, rank "
        f"{status['rank']} of {status['ranks']}"
    )
    titles = ("phase", "policy", "DSA up to", "steps over that", "indexer calls", "graph replays")
    yield table([titles, *(_phase(status, phase) for phase in PHASES)])
    layers = [(phase, policy, layers) for phase in PHASES for policy, layers in status["layers"].get(phase, {}).items()]
    if layers:
        yield table([("phase", "policy file", "layers"), *layers])
    declined = [(phase, *each) for phase in PHASES for each in sorted(status["declined"][phase].items())]
    if declined:
        yield table([("left to DSA", "because", "calls"), *declined])
    rows = [
        (phase, layer, f"{row['recall']:.3f}", f"{row['p10']:.3f}", f"{row['score_mass']:.3f}", row["rows"])
        for phase in PHASES
        for layer, row in status["recall"][phase].items()
    ]
    if rows:
        yield table([("audited", "layer", "recall", "its p10", "score mass", "rows"), *rows])
    yield f"{status['page_stats_bytes'] / 2**20:.1f} MiB of page statistics"
    if (selected := status["prefill_rows"])["selected"]:
        yield f"{selected['slow']} of {selected['selected']} prefill rows, counted a layer, were selected the slow way"
    moved = [
        (phase, layer, state["policy"], state["moves"])
        for phase in PHASES
        for layer, state in status["ladder"][phase].items()
    ]
    if moved:
        yield table([("recall ladder", "layer", "selected by", "moves"), *moved])
    for what in _given_back(status):
        yield f"WARNING: {what} is back on stock DSA, as its recall is low; see Guard recall in docs/operations.md"
    if dump := status["dump"]:
        ended = "; nothing more is dumped after an error, see the server's log" if dump.get("stopped") else ""
        yield f"dumped: {dump.get('prompts', 0)} prompts, {dump.get('left_out', 0)} left out{ended}"
    for phase in status["unrouted"]:
        yield (
            f"WARNING: {phase} is not selected by {status['policy'][phase]}: SGLang does not ask the indexer; see the "
            "server's log"
        )


def _given_back(status: Mapping[str, Any]) -> list[str]:
    """What stock DSA selects for low recall: prefill by layer, decode as a whole, as it has that one rung below."""
    layers, decode = status["dense_layers"], status["ladder"]["decode"]
    prefill = [f"prefill (layers {ranges(layers)})"] if layers else []
    return prefill + ["all of decode" for state in decode.values() if state["rung"]]


def _phase(status: Mapping[str, Any], phase: str) -> tuple[object, ...]:
    gate = status["min_len"].get(phase)
    return (
        phase,
        status["policy"][phase],
        "any length" if gate is None else f"{gate} tokens" + _step_gate(status, phase),
        "-" if gate is None else status["steps_over_gate"][phase],
        _counts(status["calls"][phase]),
        _counts(status["replays"]) if phase == "decode" else "-",
    )


def _step_gate(status: Mapping[str, Any], phase: str) -> str:
    """What a decode step must have too."""
    least = [(status["min_rows"], "rows"), (status["min_tokens"], "tokens beyond them")] if phase == "decode" else []
    words = [f"{count} {what}" for count, what in least if count > 1]
    return f", or under {' or '.join(words)}" if words else ""


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{path} {count}" for path, count in counts.items()) or "none"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
