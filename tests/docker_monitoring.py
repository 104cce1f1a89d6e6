"""Every PromQL expression that docker/monitoring ships, and the metrics that may stand in one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

DOCKER = Path(__file__).resolve().parents[1] / "docker"
DASHBOARD = DOCKER / "monitoring/grafana/dashboards/sglang-misa.json"
ALERTS = DOCKER / "monitoring/prometheus/alerts.yaml"
METRIC = re.compile(r"sglang(?:_misa)?:\w+")
GPU_ONLY = ("sglang_misa:replays_total",)  # CUDA graphs: no data on a CPU


def panels() -> Iterator[tuple[str, str]]:
    """(title, expression) of each query of the dashboard, for all servers."""
    for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"].replace("$instance", ".*")


def alerts() -> Iterator[tuple[str, str]]:
    """(name, expression) of each alert."""
    for group in yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]
