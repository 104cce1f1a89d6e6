"""The report and its data: looked at in a browser, and held against the published schema."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
from load.helpers import SMALL, MockProcess, results, units
from rich.console import Console
from rich.table import Column, Table

from sglang_misa.bench.load import plots, progress, shell
from sglang_misa.bench.load import results as results_module
from sglang_misa.bench.load.cli import main
from sglang_misa.bench.load.control import Control
from sglang_misa.bench.load.safety import Keys
from sglang_misa.bench.load.settings import Access
from sglang_misa.bench.load.shell import GATE_FAILED, OK
from sglang_misa.bench.load.watch import GpuWatch

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
WIDTHS = (1280, 390)
MEASURE = """
<body style="margin:0">
<iframe id="page" style="border:0;height:900px" srcdoc="{page}"></iframe>
<pre id="told"></pre>
<script>
const frame = document.getElementById("page"), told = {{}};
frame.onload = () => {{
  for (const width of {widths}) {{
    frame.style.width = width + "px";
    const root = frame.contentDocument.documentElement;
    frame.contentDocument.querySelectorAll("details").forEach((d) => (d.open = true));
    const wide = [...frame.contentDocument.querySelectorAll(".scroll, pre, dl, ul, figure, .verdict")]
      .filter((e) => e.scrollWidth > e.clientWidth + 1 || e.getBoundingClientRect().right > width + 1);
    const names = wide.map((e) => e.outerHTML.slice(0, 200));
    told[width] = {{scroll: root.scrollWidth, width: root.clientWidth, wide: names}};
  }}
  document.getElementById("told").textContent = JSON.stringify(told);
}};
</script>
"""


@pytest.fixture(scope="module")
def run(mocks: tuple[MockProcess, MockProcess], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An A/B of two contexts and two loads with failures, a failed gate and service limits."""
    folder = tmp_path_factory.mktemp("report")
    mocks[0].script(ttft=0.02)
    mocks[1].script(ttft=0.03, fault="error_flat", fault_every=9)
    (folder / "slo.toml").write_text("ttft = 0.5")
    arms = ["--a", mocks[0].url, "--b", mocks[1].url, "--names", "stock", "misa with <b>marks</b>"]
    grid = ["--contexts", "1k", "2k", "--concurrencies", "1", "2", "--blocks", "2", "--slo", str(folder / "slo.toml")]
    more = ["--fail-if", "ttft_p50 > 0.1", "ttft_max > 60", "--warmup", "0", "--sample-s", "0.1"]
    assert main(["ab", *arms, *grid, *SMALL, *more, "--out", str(folder)]) == GATE_FAILED
    return folder


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH")
def test_the_report_fits_a_desk_and_a_phone(run, tmp_path):
    page = (run / "report.html").read_text()
    (tmp_path / "look.html").write_text(MEASURE.format(page=html.escape(page), widths=list(WIDTHS)))
    words = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--window-size=1400,1000",
    ]
    words += ["--virtual-time-budget=5000", "--dump-dom", f"--user-data-dir={tmp_path / 'profile'}"]
    seen = subprocess.run([*words, f"file://{tmp_path}/look.html"], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in seen.stderr, seen.stderr
    told = json.loads(html.unescape(seen.stdout.split('<pre id="told">')[1].split("</pre>")[0]))
    for width in WIDTHS:
        assert told[str(width)]["width"] in (width, width - 15)  # less a scroll bar
        assert told[str(width)]["scroll"] <= told[str(width)]["width"]
        assert told[str(width)]["wide"] == []


def test_the_report_says_what_a_reader_asks_for(run):
    page = (run / "report.html").read_text()
    data = results(run)
    assert html.escape(data["verdict"]) in page
    assert "misa with &lt;b&gt;marks&lt;/b&gt;" in page
    assert "<b>marks" not in page
    for heading in ("By context and load", "Gates", "Errors", "Environment", "The command that repeats it", "Figures"):
        assert heading in page
    assert "EngineCore died" in page
    assert "sglang_misa.bench.load ab --a http://127.0.0.1" in page
    assert page.index("By context and load") < page.index("Plots") < page.index("Gates")
    assert not any(f'{attribute}="http' in page for attribute in ("src", "href"))
    shown = {p.stem for p in (run / "plots").iterdir()}
    assert {"ratios", "distributions", "timeline", "ttft_by_context"} <= shown


def test_only_a_gate_on_a_ratio_tells_a_ratio(run):
    rows = re.findall(r"<td[^>]*>fails if (\w+) .*?<td[^>]*>([^<]*)</td></tr>", (run / "report.html").read_text())
    told = {(name, value.endswith("×")) for name, value in rows}
    assert told == {("ttft_p50", True), ("ttft_max", False), ("error_rate", False)}


def test_results_follow_the_published_schema(run):
    published = Path(results_module.__file__).with_name("results.schema.json").read_text()
    assert published == results_module.schema(), "run python -m sglang_misa.bench.load.results > …/results.schema.json"
    again = results_module.Results.model_validate_json((run / "results.json").read_bytes())
    assert again.schema_version == results_module.SCHEMA
    assert again.environment is not None
    assert again.environment.client["Python"].startswith(f"{sys.version_info.major}.")
    assert set(json.loads(published)["required"]) <= results(run).keys()


def test_timelines_hold_every_token(run):
    for unit in units(run):
        tokens = sum(r["output_tokens"] for r in unit["records"] if r["error"] is None)
        binned = sum(rate for _, rate in unit["timeline"]["tokens_s"])  # bins of a second
        assert binned == pytest.approx(tokens, abs=0.1)
        assert unit["timeline"]["in_flight"][-1][1] == 0


def test_gauges_of_a_server_under_load(monkeypatch):
    text = (
        b'# HELP x y\nsglang:num_running_reqs{rank="0"} 3.0\nsglang:num_running_reqs{rank="1"} 4.0\n'
        b'sglang:token_usage{rank="0"} 0.25\nsglang:token_usage{rank="1"} 0.75\nsglang:num_running_reqs_total 9\n'
    )
    control = Control("http://127.0.0.1:1", Access(), Keys())
    monkeypatch.setattr(control, "call", lambda *_, **__: (200, text))
    assert control.gauges() == {"running": 7.0, "kv_used_share": 0.5}


def test_energy_of_all_gpus(monkeypatch):
    """NVML as it is scripted here: two GPUs that use 50 J each between two readings."""
    readings = iter([1000.0, 2000.0, 51_000.0, 52_000.0])
    nvml = types.SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetTotalEnergyConsumption=lambda _: next(readings),
        nvmlDeviceGetMemoryInfo=lambda _: types.SimpleNamespace(used=2**30),
        nvmlDeviceGetPowerUsage=lambda _: 100_000,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with GpuWatch(local=True) as watch:
        pass
    assert watch.figures() == {"gpu_energy_j": 100.0}


def test_a_run_of_one_server_tells_its_figures(mocks, pictures, tmp_path):
    mocks[0].script(ttft=0.02)
    assert main(["run", mocks[0].url, *SMALL, "--blocks", "2", "--out", str(tmp_path)]) == OK
    assert "TTFT p50 2" in results(tmp_path)["verdict"]
    assert "CI over blocks" in (tmp_path / "report.html").read_text()


@dataclass(frozen=True)
class Nothing:
    """A command without options."""


def test_names_and_logs_are_no_markup_and_no_formulas(pictures, monkeypatch, capsys):
    """What stands in brackets or between dollars is the user's, or a server's: it must not end a run."""
    odd = "[/INST] $\\nope$ [red] :100:"
    monkeypatch.setattr(progress, "QUIET_S", -1.0)

    def act(command: Nothing, console: Console) -> int:
        console.print(Table(Column(odd)))
        for terminal in (console, Console(force_terminal=True, markup=False, emoji=False)):
            with progress.Live(terminal, 2) as live:
                live.waiting(odd, odd, 1.0)
                live.unit(odd)
                live.request("measure", 0, 2, None)
                live.finished(odd)
        return OK

    assert shell.run(Nothing, act, "module", [], "") == OK
    told = capsys.readouterr().out
    assert odd in told
    assert chr(0x1F4AF) not in told
    figure = plots.Figure()
    axes = figure.add_subplot(xscale="log", xlim=(1, 1000))
    axes.plot([1, 2], label=odd)
    axes.set_yticks([1], [odd])
    axes.legend()
    assert plots.png(plots.take_literally(figure))
    assert odd in plots.svg(figure)
    assert all(tick.get_parse_math() for tick in axes.get_xticklabels()), "powers of ten are formulas"
