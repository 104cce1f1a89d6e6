"""The dashboard and the alerts ask for metrics that exist, of the data source that is provisioned."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from docker_monitoring import ALERTS, DASHBOARD, DOCKER, METRIC, alerts, panels

from sglang_misa.metrics import REASONS

LIST_OURS = """
from prometheus_client import CollectorRegistry, REGISTRY
from sglang_misa.metrics import PLACE, _Exporter

_Exporter(*PLACE)
print(*(name for name in REGISTRY._names_to_collectors if name.startswith("sglang_misa:")))
"""
SUFFIXES = re.compile(r"_(bucket|sum|count|total)$")
WRITTEN = {*panels(), *alerts()}


@pytest.fixture(scope="module")
def exported():
    """Names of our metrics, asked of the exporter in a process of its own."""
    run = subprocess.run([sys.executable, "-c", LIST_OURS], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.fixture(scope="module")
def sglangs():
    """Names of SGLang's metrics, read from its sources."""
    found = importlib.util.find_spec("sglang")
    if found is None or found.origin is None:
        pytest.skip("SGLang is not installed")
    source = (Path(found.origin).parent / "srt/observability/metrics_collector.py").read_text(encoding="utf-8")
    return {SUFFIXES.sub("", name) for name in re.findall(r'"(sglang:\w+)"', source)}


@pytest.mark.parametrize(("name", "expression"), sorted(WRITTEN))
def test_every_metric_exists(name, expression, exported, sglangs):
    metrics = set(METRIC.findall(expression))
    assert metrics or "up{" in expression, name
    for metric in metrics:
        known = exported if metric.startswith("sglang_misa:") else sglangs
        assert metric in known or SUFFIXES.sub("", metric) in known, f"{name}: no metric {metric}"


def test_every_metric_of_ours_is_watched(exported):
    watched = {SUFFIXES.sub("", metric) for _, expression in WRITTEN for metric in METRIC.findall(expression)}
    families = {re.sub(r"_(bucket|sum|count|total|created)$", "", name) for name in exported}
    assert families - watched == set()


def test_the_dashboard_asks_the_provisioned_source():
    folder = DOCKER / "monitoring/grafana/provisioning"
    (source,) = yaml.safe_load((folder / "datasources/prometheus.yaml").read_text())["datasources"]
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    assert {target["datasource"]["uid"] for panel in board["panels"] for target in panel.get("targets", [])} == {
        source["uid"]
    }
    (provider,) = yaml.safe_load((folder / "dashboards/sglang-misa.yaml").read_text())["providers"]
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    binds = [volume for volume in services["grafana"]["volumes"] if isinstance(volume, dict)]
    mounts = {mount["source"]: mount["target"] for mount in binds}
    assert mounts["./monitoring/grafana/dashboards"] == provider["options"]["path"]
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in services


def test_panels_neither_overlap_nor_share_a_number():
    places = [(panel["id"], panel["gridPos"]) for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]]
    assert len({number for number, _ in places}) == len(places)
    cells = [(x, y) for _, p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")


@promtool
@pytest.mark.parametrize(
    "words",
    ["check config prometheus.yaml", "check rules --lint=all --lint-fatal alerts.yaml", "test rules alerts_test.yaml"],
)
def test_promtool_agrees(words):
    run = subprocess.run(["promtool", *words.split()], cwd=ALERTS.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_alert_is_tested():
    tests = yaml.safe_load(ALERTS.with_name("alerts_test.yaml").read_text(encoding="utf-8"))["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    fires = {case["alertname"] for case in cases if case["exp_alerts"]}
    stays = {case["alertname"] for case in cases if not case["exp_alerts"]}
    assert fires == stays == {name for name, _ in alerts()}


def test_reasons_are_those_that_calls_are_declined_for():
    files = [*(DOCKER.parent / "sglang_misa").glob("*.py"), *(DOCKER.parent / "patches").glob("*.py")]
    source = "".join(file.read_text(encoding="utf-8") for file in files if file.name != "metrics.py")
    assert [reason for reason in REASONS if f'"{reason}"' not in source] == []
    (no_fault,) = {words for _, expression in alerts() for words in re.findall(r'reason!~"([^"]+)"', expression)}
    assert set(no_fault.split("|")) < set(REASONS)


def test_every_alert_is_in_the_operators_page():
    page = (DOCKER.parent / "docs/operations.md").read_text(encoding="utf-8")
    assert [name for name, _ in alerts() if f"`{name}`" not in page] == []
