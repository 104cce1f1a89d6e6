"""What this rank did: counts for /server_info and, under --enable-metrics, Prometheus metrics sglang_misa:*.

Under CUDA graphs the indexer's Python runs at capture only, so decode calls are counted once a captured shape
(`captured:<policy>`). Where a shape has a graph for each side of the decode gate, every replay is counted by its side.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sglang_misa import __version__
from sglang_misa.config import PHASES, MisaConfig, Phase, SelectionPolicy, preset_name
from sglang_misa.text_tables import ranges

RECALL_BINS = 1000  # a layer's recalls are kept as a histogram of this resolution
RECALL_BUCKETS = (0.5, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.96, 0.97, 0.98, 0.985, 0.99, 0.995, 0.999, 1.0)
LOW_PERCENTILE = 0.1
PLACE = ("dp_rank", "pp_rank", "tp_rank")  # labels of every metric, named as SGLang's, so that both families join
# Why a call is left to DSA.
REASONS = ("policy-is-dsa", "under-min-len", "all-tokens-visible", "few-rows", "few-tokens", "recall-floor")
UNROUTED_STEPS = 8  # over the gate in a phase, after which its policy must have selected at least once

logger = logging.getLogger(__name__)


@dataclass
class _LayerRecall:
    """Running sums over the audited rows of one layer."""

    rows: int = 0
    recall: float = 0.0
    iou: float = 0.0
    score_mass: float = 0.0
    bins: Counter[int] = field(default_factory=Counter)

    def add(self, recall: float, iou: float, score_mass: float) -> None:
        self.rows += 1
        self.recall += recall
        self.iou += iou
        self.score_mass += score_mass
        self.bins[int(recall * RECALL_BINS)] += 1

    def low(self) -> float:
        """The recall that a tenth of the rows (at least one) do not exceed, rounded down to a bin."""
        seen = 0
        for bin_, count in sorted(self.bins.items()):
            seen += count
            if seen >= LOW_PERCENTILE * self.rows:
                return bin_ / RECALL_BINS
        return 0.0

    def status(self) -> dict[str, float]:
        return {
            "recall": self.recall / self.rows,
            "p10": self.low(),
            "iou": self.iou / self.rows,
            "score_mass": self.score_mass / self.rows,
            "rows": self.rows,
        }


class Recorder:
    """One rank's counts. Everything runs on the scheduler's only thread."""

    def __init__(self) -> None:
        self.page_stats_bytes = 0
        self._armed: dict[str, Any] = {}
        self._calls: dict[Phase, Counter[str]] = {phase: Counter() for phase in PHASES}
        self._declined: dict[Phase, Counter[str]] = {phase: Counter() for phase in PHASES}
        self._replays: Counter[str] = Counter()
        self._gates: dict[Phase, int] = {}
        self._over_gate: Counter[Phase] = Counter()
        self._unrouted: set[Phase] = set()
        self._recall: dict[tuple[Phase, int], _LayerRecall] = {}
        self._rungs: dict[tuple[Phase, str], tuple[int, SelectionPolicy]] = {}
        self._moves: Counter[tuple[Phase, str]] = Counter()
        self._selected_rows = 0
        self.slow_rows: Callable[[], int] = int  # rows of them that the kernels selected the slow way so far
        self.ranks_compared = 0  # times that tensor-parallel ranks compared what they selected, and found it the same
        self.dump: Counter[str] = Counter()  # prompts that were written, and left_out; stopped: 1 after an error
        self._verified: Counter[str] = Counter(pages=0, mismatches=0)
        self._exporter: _Exporter | None = None

    def armed(self, config: MisaConfig, rank: int, ranks: int, *, sglang: str, verified: bool) -> None:
        """This rank's hooks are in place: `rank` of `ranks` in its process group, under SGLang's version `sglang`.

        verified: whether this package has served with that version on such a device before.
        """
        self._gates = {phase: gate for phase in PHASES if (gate := config.gate(phase)) is not None}
        self._armed = {
            "preset": preset_name(config),
            "sglang": sglang,
            "verified": verified,
            "policy": {phase: config.name(phase) for phase in PHASES},
            "layers": {phase: by_policy(config, phase) for phase in PHASES},
            "min_len": self._gates,
            "min_rows": config.decoding.min_rows,
            "min_tokens": config.decoding.min_tokens,
            "rank": rank,
            "ranks": ranks,
        }

    def ran(self, phase: Phase, path: str) -> None:
        """One indexer call of a layer took `path`: a policy's name, "dsa", or either after "captured:"."""
        self._calls[phase][path] += 1
        if self._exporter:
            self._exporter.calls.labels(*self._exporter.place, phase, path).inc()

    def replayed(self, path: str) -> None:
        """One decode step replayed the graph of `path`: "dsa" under the gate, else the policy's name."""
        self._replays[path] += 1
        if self._exporter:
            self._exporter.replays.labels(*self._exporter.place, path).inc()

    def stepped(self, phase: Phase) -> None:
        """A step of `phase` begins that is over its policy's gate, with more tokens than the model's top-k.

        Live hooks may still never be called: from UNROUTED_STEPS such steps on without one selection by the policy,
        the log, the status and a metric say so.
        """
        routed = self._routed(phase)
        if (self._over_gate[phase] >= UNROUTED_STEPS and not routed) != (phase in self._unrouted):
            self._unrouted ^= {phase}
            if not routed:
                logger.error(
                    "expected %s to select in %s steps over its gate, got %d such steps and not one selection: SGLang "
                    "does not ask the indexer; restart without what replaces its attention, or without --misa-* flags",
                    self._armed["policy"][phase],
                    phase,
                    self._over_gate[phase],
                )
            if self._exporter:
                self._exporter.unrouted.labels(*self._exporter.place, phase).set(not routed)
        self._over_gate[phase] += 1

    def _routed(self, phase: Phase) -> int:
        """Selections of `phase` by a policy, or left to DSA for having few rows.

        A captured one counts where no graph has a variant to count replays.
        """
        counts = [*self._calls[phase].items()]
        if phase == "decode" and self._replays:
            counts = [(path, n) for path, n in counts if not path.startswith("captured:")] + [*self._replays.items()]
        asked = self._declined["prefill"]["few-rows"] if phase == "prefill" else 0
        return asked + sum(n for path, n in counts if not path.endswith("dsa"))

    def declined(self, phase: Phase, reason: str) -> None:
        """One call was left to stock DSA because of `reason`, a short word with dashes."""
        self._declined[phase][reason] += 1
        if self._exporter:
            self._exporter.declined.labels(*self._exporter.place, phase, reason).inc()

    def audited(self, phase: Phase, layer: int, recall: float, iou: float, score_mass: float) -> None:
        """One row of `layer` was compared with the dense indexer; see `audit.overlap`."""
        self._recall.setdefault((phase, layer), _LayerRecall()).add(recall, iou, score_mass)
        if self._exporter:
            self._exporter.recall.labels(*self._exporter.place, phase, str(layer)).observe(recall)

    def guarded(self, phase: Phase, layer: str, rungs: Sequence[SelectionPolicy]) -> None:
        """A ladder of `phase` with these rungs stands on the first: of one layer, or of "all" in decode."""
        if self._exporter:
            self._exporter.rung.labels(*self._exporter.place, phase, layer).set(0)
            for policy in rungs:
                self._exporter.moves.labels(*self._exporter.place, phase, layer, policy.name)

    def moved(self, phase: Phase, layer: str, rung: int, policy: SelectionPolicy) -> None:
        """A ladder of `phase` came to `rung`, where `policy` selects: of one layer, or of "all" in decode.

        Recall in the status begins anew there: a mean over several policies would tell of none of them.
        """
        moved = [key for key in self._recall if key[0] == phase and layer in ("all", str(key[1]))]
        for key in moved:
            del self._recall[key]
        self._rungs[phase, layer] = rung, policy
        self._moves[phase, layer] += 1
        if self._exporter:
            self._exporter.rung.labels(*self._exporter.place, phase, layer).set(rung)
            self._exporter.moves.labels(*self._exporter.place, phase, layer, policy.name).inc()
            self._exporter.dense_layers.labels(*self._exporter.place).set(len(self._dense_layers()))

    def _dense_layers(self) -> list[int]:
        """Layers whose prefill stock DSA selects for low recall."""
        moved = [(layer, policy) for (phase, layer), (_, policy) in self._rungs.items() if phase == "prefill"]
        return sorted(int(layer) for layer, policy in moved if not policy.active)

    def selected(self, rows: int) -> None:
        """An extend call of so many rows was selected by this package, in one layer."""
        self._selected_rows += rows

    def verified(self, pages: int, mismatches: int) -> None:
        """The statistics of so many pages were computed anew in one step, and so many were not those stored."""
        self._verified.update(pages=pages, mismatches=mismatches)
        if self._exporter:
            self._exporter.verified.labels(*self._exporter.place).inc(pages)
            self._exporter.mismatches.labels(*self._exporter.place).inc(mismatches)

    def status(self) -> dict[str, Any]:
        """Everything counted, in plain types; {"enabled": False, …} before `armed`."""
        return {
            "enabled": bool(self._armed),
            "version": __version__,
            **self._armed,
            "calls": {phase: dict(counts) for phase, counts in self._calls.items()},
            "declined": {phase: dict(reasons) for phase, reasons in self._declined.items()},
            "replays": dict(self._replays),
            "steps_over_gate": {phase: self._over_gate[phase] for phase in self._gates},
            "unrouted": sorted(self._unrouted),
            "recall": {
                phase: {str(layer): rows.status() for (p, layer), rows in sorted(self._recall.items()) if p == phase}
                for phase in PHASES
            },
            "ladder": {
                phase: {
                    layer: {"rung": rung, "policy": policy.label, "moves": self._moves[phase, layer]}
                    for (p, layer), (rung, policy) in sorted(self._rungs.items())
                    if p == phase
                }
                for phase in PHASES
            },
            "dense_layers": self._dense_layers(),
            "prefill_rows": {"selected": self._selected_rows, "slow": self.slow_rows()},
            "dump": dict(self.dump),
            "page_stats_bytes": self.page_stats_bytes,
            "page_stats_verified": dict(self._verified),
            "ranks_compared": self.ranks_compared,
        }

    def export(self, config: MisaConfig, sglang: str, *, tp_rank: int, pp_rank: int, dp_rank: int | None) -> None:
        """Publish to Prometheus from now on. Only in a scheduler process: PROMETHEUS_MULTIPROC_DIR must be set.

        All of a server's processes share one set of metrics, told apart by their ranks. An empty label is none to
        Prometheus: without data parallelism SGLang's metrics have no dp_rank either.
        """
        if self._exporter is None:
            self._exporter = _Exporter("" if dp_rank is None else str(dp_rank), str(pp_rank), str(tp_rank))
            self._exporter.describe(config, sglang)

    def publish_page_stats(self) -> None:
        """Export the bytes of page statistics, once the pools stand."""
        if self._exporter:
            self._exporter.page_stats_bytes.labels(*self._exporter.place).set(self.page_stats_bytes)


def by_policy(config: MisaConfig, phase: Phase) -> dict[str, str]:
    """The layers that each policy of a policy file has, as in 0-3,7; nothing without such a file."""
    found: dict[str, list[int]] = {}
    if config.layers is None:
        return {}
    for layer, policy in enumerate(config.layers.policies(phase)):
        found.setdefault(policy.label, []).append(layer)
    return {label: ranges(layers) for label, layers in found.items()}


class _Exporter:
    """The Prometheus metrics, each labelled with PLACE. Importing prometheus_client fixes its storage, so: here."""

    def __init__(self, *place: str):
        from prometheus_client import Counter as Count
        from prometheus_client import Gauge, Histogram

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"sglang_misa:{name}", text, (*PLACE, *labels), multiprocess_mode="mostrecent")

        def count(name: str, text: str, *labels: str) -> Count:
            return Count(f"sglang_misa:{name}", text, (*PLACE, *labels))

        self.place = place
        self.enabled = gauge("enabled", "1 where the hooks are live.")
        self.build_info = gauge("build_info", "1, labelled with the versions.", "version", "sglang")
        self.policy_info = gauge("policy_info", "1, labelled with the policy of the phase.", "phase", "policy")
        self.routed_heads = gauge("routed_heads", "Index heads routed per query, at most; 0 for all.", "phase")
        self.page_stats_bytes = gauge("page_stats_bytes", "Bytes of page statistics beside the index-K pages.")
        self.dense_layers = gauge("dense_layers", "Layers whose prefill stock DSA selects for low recall.")
        self.rung = gauge("rung", "Rung of the recall ladder in use, 0 for the layer's own policy.", "phase", "layer")
        labels = ("phase", "layer", "policy")
        self.moves = count("ladder_moves", "Moves on the recall ladder, by what selects since.", *labels)
        self.unrouted = gauge("unrouted", "1 where steps over the gate are not selected by the policy.", "phase")
        self.calls = count("calls", "Indexer calls of a layer by path taken.", "phase", "path")
        self.declined = count("declined", "Calls left to stock DSA.", "phase", "reason")
        self.replays = count("replays", "Decode graphs replayed by side of the gate.", "path")
        self.verified = count("page_stats_verified", "Pages whose statistics were computed anew and compared.")
        self.mismatches = count("page_stats_mismatches", "Pages whose stored statistics were not those computed anew.")
        self.recall = Histogram(
            "sglang_misa:recall_sampled",
            "Recall of audited rows, by whatever rung of the ladder selected them.",
            (*PLACE, "phase", "layer"),
            buckets=RECALL_BUCKETS,
        )

    def describe(self, config: MisaConfig, sglang: str) -> None:
        """Set what is known at the start, and start counters at 0: rate() does not see the step from absent to 1."""
        self.enabled.labels(*self.place).set(1)
        self.build_info.labels(*self.place, __version__, sglang).set(1)
        self.dense_layers.labels(*self.place).set(0)
        self.verified.labels(*self.place)
        self.mismatches.labels(*self.place)
        for phase in PHASES:
            paths = {"dsa", *(policy.name for policy in config.policies(phase))}
            for path in paths:
                self.calls.labels(*self.place, phase, path)
            for reason in REASONS:
                self.declined.labels(*self.place, phase, reason)
            self.policy_info.labels(*self.place, phase, config.name(phase)).set(1)
            self.unrouted.labels(*self.place, phase).set(0)
            heads = max((policy.heads or 0 for policy in config.policies(phase)), default=0)
            self.routed_heads.labels(*self.place, phase).set(heads)


recorder = Recorder()
