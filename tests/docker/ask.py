"""Requests of the proof to the server and to Prometheus, inside the engine's network namespace."""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from docker_monitoring import GPU_ONLY, METRIC, alerts, panels

SERVER, PROMETHEUS = "http://127.0.0.1:30000", "http://127.0.0.1:9090"
SCRAPES = 240.0  # seconds in which a busy machine answers two of them, so that rates have data
PROMPT = "A long text about nothing in particular. " * 40
GENERATE = {"text": PROMPT, "sampling_params": {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}}
JOINED = (
    "sglang:token_usage * on (instance, dp_rank, pp_rank, tp_rank) group_left (policy)"
    ' sglang_misa:policy_info{phase="prefill"}'
)
OPEN = {"none": 200, "wrong": 200, "user": 200, "admin": 200}
USER = {"none": 401, "wrong": 401, "user": 200, "admin": 401}
ADMIN = {"none": 401, "wrong": 401, "user": 401, "admin": 200}
MATRIX: tuple[tuple[str, Any, dict[str, int]], ...] = (
    ("/health", None, OPEN),
    ("/ready", None, OPEN),
    ("/metrics", None, OPEN),
    ("/v1/models", None, USER),
    ("/v1/completions", {"prompt": "Short.", "max_tokens": 2}, USER),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Short."}], "max_tokens": 2}, USER),
    ("/generate", GENERATE, USER),
    ("/server_info", None, USER),
    ("/get_server_info", None, USER),
    ("/flush_cache", {}, ADMIN),
    ("/update_weights_from_disk", {"model_path": "/nowhere"}, ADMIN | {"admin": 400}),
    ("/abort_request", {"rid": "none"}, ADMIN),
)


def request(url: str, body: Any = None, key: str | None = None) -> tuple[int, bytes]:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=120) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def read_keys() -> dict[str, str | None]:
    user, admin = (Path(os.environ[name]).read_text().strip() for name in ("API_KEY_FILE", "ADMIN_API_KEY_FILE"))
    return {"none": None, "wrong": "wrong", "user": user, "admin": admin}


def evaluate(expression: str) -> list[Any]:
    status, text = request(f"{PROMETHEUS}/api/v1/query?" + urllib.parse.urlencode({"query": expression}))
    assert status == 200, f"{expression}: {text!r}"
    return json.loads(text)["data"]["result"]


def keys() -> None:
    """Every endpoint of MATRIX with every key: the status, and no key in any answer."""
    given = read_keys()
    for path, body, expected in MATRIX:
        answers = {who: request(f"{SERVER}{path}", body, key) for who, key in given.items()}
        got = {who: status for who, (status, _) in answers.items()}
        assert got == expected, f"{path}: expected {expected}, got {got}"
        for _, text in answers.values():
            assert not any(key and key.encode() in text for key in (given["user"], given["admin"])), path
        print(f"  {path:25} " + "  ".join(f"{who} {status}" for who, status in got.items()))
    _, info = request(f"{SERVER}/server_info", None, given["user"])
    assert json.loads(info)["admin_api_key"] == "***"


def load() -> None:
    """A few prompts, short, long, repeated and streamed, until every query of the dashboard has data."""
    key = read_keys()["user"]
    end = time.monotonic() + SCRAPES
    while empty() and time.monotonic() < end:
        for body in (GENERATE, GENERATE | {"stream": True}, GENERATE | {"text": "Short."}):
            status, text = request(f"{SERVER}/generate", body, key)
            assert status == 200, text
        time.sleep(3)


def scraped() -> None:
    """Prometheus has reached the server by the name in prometheus.yaml; otherwise its own words on why not."""
    targets: list[Any] = []
    end = time.monotonic() + SCRAPES
    while time.monotonic() < end:
        _, text = request(f"{PROMETHEUS}/api/v1/targets")
        targets = json.loads(text)["data"]["activeTargets"]
        if targets and all(target["health"] == "up" for target in targets):
            _, text = request(f"{PROMETHEUS}/api/v1/status/buildinfo")
            print(f"  scraped by Prometheus {json.loads(text)['data']['version']}")
            return
        time.sleep(1)
    raise AssertionError(f"expected every target up, got {[(t['scrapeUrl'], t['lastError']) for t in targets]}")


def needs_gpu(expression: str) -> bool:
    return not set(METRIC.findall(expression)).isdisjoint(GPU_ONLY)


def empty() -> list[str]:
    """The dashboard's queries without data, but for those of what only GPUs count."""
    return [f"{name}: {query}" for name, query in panels() if not needs_gpu(query) and not evaluate(query)]


def queries() -> None:
    """Every query of the dashboard and of the alerts; the dashboard's return data, but for what only GPUs count."""
    assert not empty(), "no data:\n" + "\n".join(empty())
    for name, query in panels():
        if needs_gpu(query):
            print(f"  needs a GPU: {name}: {query}")
        elif all(float(one["value"][1]) == 0 for one in evaluate(query)):
            print(f"  0 throughout: {name}: {query}")
    assert evaluate(JOINED), f"our metrics do not join with SGLang's: {JOINED}"
    true = [name for name, expression in alerts() if evaluate(expression)]
    served = [query for _, query in panels() if not needs_gpu(query)]
    print(f"  {len(served)} queries of the dashboard have data; alerts that are true: {true}")


if __name__ == "__main__":
    {"keys": keys, "scraped": scraped, "load": load, "queries": queries}[sys.argv[1]]()
