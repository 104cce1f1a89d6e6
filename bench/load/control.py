"""A server's control endpoints: readiness, facts, flush, tokenizer, metrics. Not used while requests are timed."""

from __future__ import annotations

import contextlib
import ipaddress
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import requests
from prometheus_client.parser import text_string_to_metric_families
from pydantic_core import from_json

from sglang_misa.bench.load.fields import NUMBER, FieldError, counts, mappings, text
from sglang_misa.bench.load.safety import Keys, check_target
from sglang_misa.bench.load.settings import Access, LoadError
from sglang_misa.http_request import again, within

MAX_REASON = 200  # characters of what went wrong
MAX_BODY = 64 * 1024 * 1024  # bytes of a control answer that are read at most
CONNECT_S, CALL_S = 5.0, 300.0  # seconds to connect, and of a whole call
HEALTH_S = 30.0  # seconds in which a server says whether it is ready
TOKENIZE_PIECE = 64 * 1024  # characters of one /tokenize call
FLUSH_WAIT_S = 30.0
METRICS_S = 30.0  # seconds that a reading of all metrics may take
GAUGE_S = 5.0  # seconds that a reading of gauges may take
GAUGES = {
    "sglang:num_running_reqs": "running",
    "sglang:num_queue_reqs": "queued",
    "sglang:token_usage": "kv_used_share",
    "sglang:cache_hit_rate": "cache_hit_share",
    "sglang:gen_throughput": "server_tokens_s",
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "queued",
}
COUNTED = {"running", "queued", "server_tokens_s"}  # added over ranks; the others are averaged
GAUGE = re.compile(rf"^({'|'.join(GAUGES)})(?:\{{[^}}]*\}})? ({NUMBER})(?: -?\d+)?$".encode(), re.M)
NOT_THERE = (404, 405, 410, 501)  # HTTP statuses of an endpoint that the server does not have
METRIC_PREFIXES = ("sglang:", "sglang_misa:", "vllm:")


class Control:
    """Control endpoints of the server at `url`. Every answer is bounded, no redirect is followed, no proxy is used."""

    def __init__(self, url: str, access: Access, keys: Keys, model: str | None = None):
        self.url = check_target(url, allow_remote=access.allow_remote)
        self._keys = keys
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.verify = access.ca_file or True
        self.info: dict[str, Any] = {}
        self.model = model or "default"
        self.last_error = ""  # why the server was not healthy when last asked
        self.has_metrics = True  # until it says that it has none

    @property
    def local(self) -> bool:
        """Whether the server runs on this machine."""
        host = urlsplit(self.url).hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"

    def call(
        self, method: str, path: str, *, body: Any = None, admin: bool = False, limit_s: float = CALL_S
    ) -> tuple[int, bytes]:
        """Status and body of one call, within `limit_s` seconds from connecting to the last byte.

        Raises requests.RequestException, or LoadError for a body over the bound.
        """
        return self._within(limit_s, method, path, body, admin)[:2]

    def call_patiently(self, method: str, path: str, *, body: Any, limit_s: float) -> tuple[int, bytes, float]:
        """As `call`, sent again while the server is busy; limit_s: of each try. Also the seconds of the last one."""
        tried = 0
        while True:
            begin = time.monotonic()
            status, content, retry_after = self._within(limit_s, method, path, body)
            seconds, tried = time.monotonic() - begin, tried + 1
            if not again(tried, status, retry_after):
                return status, content, seconds

    def _within(
        self, limit_s: float, method: str, path: str, body: Any, admin: bool = False
    ) -> tuple[int, bytes, str | None]:
        headers = self._keys.headers(admin=admin)
        try:
            return within(limit_s, lambda: self._call(method, path, body, headers, limit_s))
        except TimeoutError as error:
            raise requests.Timeout(str(error)) from None

    def _call(
        self, method: str, path: str, body: Any, headers: Mapping[str, str], read_s: float
    ) -> tuple[int, bytes, str | None]:
        """Status, body, and the header Retry-After."""
        with self._session.request(
            method,
            self.url + path,
            json=body,
            headers=headers,
            timeout=(CONNECT_S, read_s),
            stream=True,
            allow_redirects=False,
        ) as response:
            content = bytearray()
            for piece in response.iter_content(256 * 1024):
                content += piece
                if len(content) > MAX_BODY:
                    raise LoadError(f"{path}: expected at most {MAX_BODY} bytes, got more; is this a model server?")
            return response.status_code, bytes(content), response.headers.get("Retry-After")

    def json(self, method: str, path: str, body: Any = None) -> Any:
        """Parsed answer, or None when the server has no such endpoint or does not answer with JSON."""
        try:
            status, content = self.call(method, path, body=body)
            return from_json(content) if status == 200 else None
        except (requests.RequestException, ValueError):
            return None

    def healthy(self) -> bool:
        """Whether the server takes requests now (its /health, or /v1/models where there is none).

        Raises LoadError for what waiting does not mend: a certificate that is not trusted, a redirect.
        """
        for path in ("/health", "/v1/models"):
            try:
                status, _ = self.call("GET", path, limit_s=HEALTH_S)
            except requests.exceptions.SSLError as error:
                if "CERTIFICATE_VERIFY_FAILED" in str(error):
                    wanted, way_out = "a trusted TLS certificate", "see --ca-file"
                else:
                    wanted, way_out = "a server that speaks TLS", "give http:// where it does not"
                raise LoadError(f"{self.url}: expected {wanted}, got {error}; {way_out}") from None
            except requests.RequestException as error:
                self.last_error = _reason(error)
                return False
            if 300 <= status < 400:
                raise LoadError(f"{self.url}{path}: expected a server, got a redirect (HTTP {status}); give its target")
            if status in (401, 403):
                raise LoadError(f"{self.url}{path}: expected access, got HTTP {status}; see --api-key-env")
            if status != 404:
                self.last_error = f"HTTP {status} from {path}"
                return status == 200
        self.last_error = "HTTP 404 from /health and /v1/models"
        return False

    def refresh(self) -> dict[str, Any]:
        """Read /server_info (empty for other servers) and the model's name."""
        told = self.json("GET", "/server_info")
        self.info = told if isinstance(told, dict) else {}
        if self.model == "default":
            with contextlib.suppress(FieldError):
                models = mappings(self.json("GET", "/v1/models"), "data")
                self.model = next((name for model in models if (name := text(model, "id"))), "default")
        return self.info

    @property
    def page_size(self) -> int:
        """Tokens in the unit of prefix-cache hits; 1 when the server does not say."""
        told = self.info.get("page_size")
        return told if isinstance(told, int) and told > 0 else 1

    def flush(self) -> bool:
        """Empty the prefix cache; waits while the server is busy. False when it cannot be done."""
        deadline = time.monotonic() + FLUSH_WAIT_S
        while True:
            try:
                status, _ = self.call("POST", "/flush_cache", admin=True)
            except requests.RequestException:
                return False
            if status != 400 or time.monotonic() > deadline:
                return status == 200
            time.sleep(0.2)

    def wait_idle(self) -> bool:
        """Wait until no request runs or queues, as far as the metrics say; False when one still does."""
        deadline = time.monotonic() + FLUSH_WAIT_S
        while time.monotonic() < deadline:
            now = self.metrics()
            if not any(
                v for k, v in now.items() if k.split("{")[0] in ("sglang:num_running_reqs", "sglang:num_queue_reqs")
            ):
                return True
            time.sleep(0.2)
        return False

    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text` without special tokens, cut at blanks into calls of a bounded size. Raises LoadError."""
        tokens: list[int] = []
        for piece in _pieces(text):
            body = {"model": self.model, "prompt": piece, "add_special_tokens": False}
            try:
                status, content = self.call("POST", "/tokenize", body=body)
            except requests.RequestException as error:
                raise LoadError(
                    f"{self.url}/tokenize: expected token ids, got {_reason(error)}; see the server's log"
                ) from None
            try:
                answer = from_json(content) if status == 200 else {}
                ids = counts(answer, "tokens")
            except ValueError:  # no JSON, or not what it should be
                answer = {}
            if "tokens" not in answer:
                raise LoadError(
                    f"{self.url}/tokenize: expected token ids, got HTTP {status} (404: no such endpoint; 500 from "
                    "SGLang: a tokenizer_config.json without model_max_length); "
                    "use --text ids, which needs no tokenizer"
                )
            tokens += ids
        return tokens

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Text of token ids. Raises LoadError when the server has no such endpoint."""
        answer = self.json("POST", "/detokenize", {"model": self.model, "tokens": list(tokens)})
        text = answer.get("text", answer.get("prompt")) if isinstance(answer, dict) else None
        if not isinstance(text, str):
            raise LoadError(f"{self.url}/detokenize: expected text, got none; use --api generate or completions")
        return text

    def count_chat(self, messages: Sequence[Mapping[str, str]]) -> int:
        """Prompt tokens of a chat, template included. Raises LoadError."""
        answer = self.json("POST", "/tokenize", {"model": self.model, "messages": list(messages)})
        told = answer.get("count") if isinstance(answer, dict) else None
        if not isinstance(told, int):
            raise LoadError(f"{self.url}/tokenize: expected a chat's token count, got none; use --api completions")
        return told

    def metrics(self) -> dict[str, float]:
        """Prometheus samples of the serving engine and of MISA, buckets left out: `name{label="x"}` → finite value."""
        try:
            families = text_string_to_metric_families(self._metrics(METRICS_S).decode("utf-8", "replace"))
            return {
                sample.name + _labels(sample.labels): float(sample.value)
                for family in families
                for sample in family.samples
                if sample.name.startswith(METRIC_PREFIXES)
                and not sample.name.endswith("_bucket")
                and math.isfinite(sample.value)
            }
        except (ValueError, LookupError):  # what the parser says to a page that is none
            return {}

    def gauges(self) -> dict[str, float]:
        """What the server says of its present load, by our names; a pattern reads it: it is asked while it serves."""
        seen: dict[str, list[float]] = {}
        for match in GAUGE.finditer(self._metrics(GAUGE_S)):
            seen.setdefault(GAUGES[match[1].decode()], []).append(float(match[2]))
        return {name: sum(v) / (1 if name in COUNTED else len(v)) for name, v in seen.items()}

    def _metrics(self, limit_s: float) -> bytes:
        """The page of a server that has one; empty where it does not answer. A server without it is not asked again."""
        if not self.has_metrics:
            return b""
        try:
            status, content = self.call("GET", "/metrics", limit_s=limit_s)
            if status == 307:  # SGLang mounts the endpoint under a trailing slash
                status, content = self.call("GET", "/metrics/", limit_s=limit_s)
        except (requests.RequestException, LoadError):
            return b""
        self.has_metrics = status not in NOT_THERE
        return content if status == 200 else b""


def _reason(error: BaseException) -> str:
    """What an error of `requests` comes down to, without the layers that repeat address and path."""
    inner = error.__cause__ or error.__context__
    if inner is not None:
        return _reason(inner)
    told = str(error)[:MAX_REASON]
    return told if told.isprintable() else repr(told)  # a server that speaks no HTTP is quoted in it


def _labels(labels: Mapping[str, str]) -> str:
    return "{" + ",".join(f'{k}="{v}"' for k, v in sorted(labels.items())) + "}" if labels else ""


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = start + TOKENIZE_PIECE
        if end < len(text):
            blank = text.rfind(" ", start, end)
            end = blank if blank > start else end
        yield text[start:end]
        start = end
