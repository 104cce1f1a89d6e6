"""Settings of the user as frozen pydantic models, from which the command line and `plan.json` are made."""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import tyro
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Api = Literal["generate", "completions", "chat"]
Flush = Literal["require", "try", "never"]
Arrival = Literal["closed", "trace", "poisson", "constant", "burst"]
TOKENS = {"": 1, "k": 1024, "m": 1024 * 1024}  # suffixes of a length
AGENT_GROUPS, AGENT_TURNS, AGENT_TURN_LEN, AGENT_PAUSE_S = 8, 8, "uniform:1k:4k", 2.0
MIN_REQUESTS, WAVES, OPEN_REQUESTS = 16, 8, 64  # of a block, where the user does not say
MADE = ("builtin", "ids")  # texts that are no file
FORMAT = 2  # raised when units of an older harness must not be resumed


class LoadError(Exception):
    """Something the user can put right: what was expected, what came, what to do. Ends the program with code 2."""


AnySettings = TypeVar("AnySettings", bound="Settings")


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **fields: Any):
        """From the command line. Raises LoadError."""
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise LoadError(problem_of(error)) from None

    def digest(self) -> str:
        """Hash of every field: two equal digests describe the same measurement."""
        return hashlib.sha256(f"{FORMAT}{self.model_dump_json()}".encode()).hexdigest()[:16]


class Lengths(Settings):
    """A number of tokens, or a distribution of them: 32k · uniform:16k:32k · normal:32k:4k · choice:32k,128k."""

    kind: Literal["fixed", "uniform", "normal", "choice"]
    values: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Read one of the four spellings. `k` is 1024 tokens. Raises LoadError."""
        kind, _, rest = text.strip().partition(":")
        if not rest:
            kind, rest = "fixed", text.strip()
        values = tuple(_tokens(word, text) for word in rest.replace(":", ",").split(","))
        wanted = {"fixed": 1, "uniform": 2, "normal": 2, "choice": len(values)}
        shortest = min(values[:1] if kind == "normal" else values)
        if (
            kind not in wanted
            or len(values) != wanted[kind]
            or (kind == "uniform" and values[0] > values[1])
            or shortest < 1
        ):
            raise LoadError(
                "length: expected 32k, uniform:16k:32k, normal:32k:4k or choice:32k,64k, of a token at least; "
                f"got {text!r}; rewrite it"
            )
        return cls.model_validate({"kind": kind, "values": values})

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        """`count` lengths in tokens, each at least 1. Normal draws stay within three deviations."""
        if self.kind == "uniform":
            drawn = rng.integers(self.values[0], self.values[1] + 1, count)
        elif self.kind == "normal":
            mean, deviation = self.values
            spread = rng.normal(mean, deviation, count).clip(mean - 3 * deviation, mean + 3 * deviation)
            drawn = spread.round().astype(np.int64)
        else:
            drawn = rng.choice(np.array(self.values), count)
        return [max(1, int(n)) for n in drawn]

    @property
    def longest(self) -> int:
        """The longest length that `draw` can give."""
        return self.values[0] + 3 * self.values[1] if self.kind == "normal" else max(self.values)

    @property
    def shortest(self) -> int:
        """The shortest length that `draw` can give."""
        return max(1, self.values[0] - 3 * self.values[1] if self.kind == "normal" else min(self.values))


def _tokens(word: str, text: str) -> int:
    match = re.fullmatch(r"(\d+)([kKmM]?)", word.strip())
    if match is None:
        raise LoadError(f"length: expected whole numbers such as 900 or 32k, got {word!r} in {text!r}; rewrite it")
    return int(match[1]) * TOKENS[match[2].lower()]


class Workload(Settings):
    """What is asked."""

    workload: Annotated[
        Literal["prompts", "agent"],
        Field(
            description="prompts = each prompt once, or in turns; agent = conversations over a long context that stays "
            "cached (--input-len), with a few thousand new tokens a turn and pauses for tools between the turns"
        ),
    ] = "prompts"
    trace: Annotated[
        str | None,
        Field(
            description="JSON Lines of a recorded trace (timestamp, input_length, output_length, hash_ids) to replay"
        ),
    ] = None
    time_scale: Annotated[
        float, Field(gt=0, description="the trace's times are multiplied by this; 0.5 = twice as fast")
    ] = 1.0
    dataset: Annotated[
        str | None, Field(description="file or folder of JSON or JSON Lines with prompts, or with conversations")
    ] = None
    max_len: Annotated[
        int | None,
        Field(ge=2, description="leave out what is longer, of a trace or a data set: prompt and output tokens"),
    ] = None
    input_len: Annotated[
        str, Field(description="prompt tokens: 32k, uniform:16k:32k, normal:32k:4k, choice:32k,128k")
    ] = "32k"
    output_len: Annotated[str, Field(description="tokens to generate, in the same spellings")] = "128"
    shared_prefix: Annotated[
        float, Field(ge=0, le=99, description="percent of each prompt that is a prefix shared with others")
    ] = 0.0
    prefix_groups: Annotated[
        int | None,
        Field(ge=1, description="how many different shared prefixes there are; default: 1; agent: one a client"),
    ] = None
    turns: Annotated[
        int | None, Field(ge=1, description="turns of a conversation, each with all before it; default: 1; agent: 8")
    ] = None
    turn_len: Annotated[
        str | None,
        Field(description="new prompt tokens of each turn after the first; default: 256; agent: each, uniform:1k:4k"),
    ] = None
    pause_s: Annotated[
        float | None,
        Field(ge=0, description="mean seconds before each turn but the first, exponential; default: 0; agent: 2"),
    ] = None
    needles: Annotated[
        int, Field(ge=0, description="facts hidden in each prompt; the last is asked for, and checked")
    ] = 0
    text: Annotated[
        str,
        Field(description="builtin = seeded prose, ids = random token ids (needs no tokenizer), or a UTF-8 text file"),
    ] = "builtin"
    id_range: Annotated[tuple[int, int], Field(description="token ids of `--text ids`, from and below")] = (100, 8000)
    ignore_eos: Annotated[bool, Field(description="generate the full output length")] = True
    temperature: Annotated[float, Field(ge=0, description="sampling temperature")] = 0.0
    seed: Annotated[int, Field(ge=0, description="same seed, same prompts and arrivals")] = 0
    content: Annotated[str | None, tyro.conf.Suppress, Field(description="digest of the files that were named")] = None

    @model_validator(mode="after")
    def _check(self) -> Workload:
        for text in (self.input_len, self.output_len, self.turn_len or "1"):
            Lengths.parse(text)
        kinds = [self.workload == "agent", self.trace is not None, self.dataset is not None]
        if sum(kinds) > 1:
            raise LoadError(
                "workload: expected one of --workload agent, --trace and --dataset, got more; drop the others"
            )
        if any(kinds) and (self.needles or self.shared_prefix):
            raise LoadError(
                "workload: expected plain prompts with --needles or --shared-prefix, got an agent, a trace or data; "
                "drop one"
            )
        if self.dataset and self.text == "ids":
            raise LoadError("dataset: expected a text with a tokenizer, got --text ids; drop it")
        if self.text == "ids" and self.needles:
            raise LoadError("needles: expected a text with a tokenizer, got --text ids; use --text builtin or a file")
        return self

    def resolved(self, load: Load) -> Workload:
        """With every default that depends on the kind of work or on the load."""
        agent = self.workload == "agent"
        clients = load.concurrency if load.arrival == "closed" else AGENT_GROUPS
        defaults: dict[str, object] = {
            "prefix_groups": clients if agent else 1,
            "turns": AGENT_TURNS if agent else 1,
            "turn_len": AGENT_TURN_LEN if agent else "256",
            "pause_s": AGENT_PAUSE_S if agent else 0.0,
        }
        defaults["content"] = self.content_now()
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return self.model_copy(update=missing)

    def content_now(self) -> str | None:
        """Digest of the files that text, trace or data are read from; None where there are none, or none to read."""
        named = [Path(path) for path in (self.text, self.trace, self.dataset) if path not in (None, *MADE)]
        files = [file for path in named for file in (sorted(path.rglob("*.json*")) if path.is_dir() else [path])]
        try:
            return hashlib.sha256(b"".join(map(Path.read_bytes, files))).hexdigest()[:16] if files else None
        except OSError:  # told where it is read
            return None

    @property
    def recorded(self) -> bool:
        """Whether lengths come from a file."""
        return self.trace is not None or self.dataset is not None

    @property
    def label(self) -> str:
        """The work in a few words."""
        if self.trace or self.dataset:
            return Path(self.trace or self.dataset or "").name
        if self.workload == "agent":
            return f"{self.input_len} + {self.turns} × {self.turn_len}"
        return self.input_len


class Load(Settings):
    """How it is asked."""

    arrival: Annotated[
        Arrival, Field(description="closed = a number of clients that wait; the others send at a rate and never wait")
    ] = "closed"
    concurrency: Annotated[int, Field(ge=1, description="clients of a closed loop")] = 1
    rate: Annotated[float, Field(gt=0, description="requests a second of an open loop")] = 1.0
    burst: Annotated[int, Field(ge=1, description="requests that arrive at once, with --arrival burst")] = 8
    ramp_s: Annotated[
        float | None,
        Field(
            ge=0,
            description="seconds in which the load grows linearly from nothing; default: the clients of a closed loop "
            "start spread over one request's time, so that they do not stay in step",
        ),
    ] = None
    requests: Annotated[
        int | None,
        Field(
            ge=1, description="measured conversations; default: 8 for each client and 16 at least, or the duration's"
        ),
    ] = None
    duration_s: Annotated[
        float | None,
        Field(
            gt=0, description="seconds after which nothing more is sent; without --requests the load lasts that long"
        ),
    ] = None
    warmup: Annotated[
        int | None,
        Field(ge=0, description="unmeasured requests of the same lengths first; default: 2 to 8, by concurrency"),
    ] = None
    cooldown: Annotated[
        Literal["drain", "keep"],
        Field(
            description="drain = let the last requests finish; keep = hold the load up with unmeasured ones until then"
        ),
    ] = "drain"

    @property
    def warmups(self) -> int:
        return max(2, min(self.concurrency, 8)) if self.warmup is None else self.warmup

    @property
    def asked(self) -> int | None:
        """Measured conversations of a block; None where the duration decides."""
        if self.requests is not None or self.arrival == "trace":
            return self.requests
        if self.duration_s is not None:
            return None
        return max(MIN_REQUESTS, WAVES * self.concurrency) if self.arrival == "closed" else OPEN_REQUESTS

    @property
    def seconds(self) -> float:
        """Seconds after which nothing more is sent."""
        return math.inf if self.duration_s is None else self.duration_s

    def resolved(self, workload: Workload) -> Load:
        """With every default that depends on the work: a trace has its own times, an agent's turns are its waves."""
        if workload.trace is not None and self.arrival == "closed":
            return self.model_copy(update={"arrival": "trace"})
        if workload.workload == "agent" and self.requests is None and self.duration_s is None:
            return self.model_copy(update={"requests": self.concurrency if self.arrival == "closed" else AGENT_GROUPS})
        return self


class Protocol(Settings):
    """How requests are written."""

    api: Annotated[Api, Field(description="generate = SGLang's own, completions and chat = OpenAI-compatible")] = (
        "generate"
    )
    model: Annotated[str | None, Field(description="model name of OpenAI requests; default: the server's first")] = None
    openai_extras: Annotated[
        bool, Field(description="send ignore_eos and continuous usage, which SGLang and vLLM know and OpenAI refuses")
    ] = True


class Access(Settings):
    """What opens the servers' doors."""

    api_key_env: Annotated[str | None, Field(description="environment variable that holds the API key")] = None
    api_key_file: Annotated[str | None, Field(description="file that holds the API key")] = None
    admin_key_env: Annotated[str | None, Field(description="environment variable with the admin key (flush)")] = None
    admin_key_file: Annotated[str | None, Field(description="file with the admin key (flush)")] = None
    ca_file: Annotated[str | None, Field(description="PEM file of the authority that signed the TLS certificate")] = (
        None
    )
    allow_remote: Annotated[bool, Field(description="allow targets outside loopback and private networks")] = False


class Serving(Settings):
    """How servers are started, stopped and emptied."""

    flush: Annotated[Flush, Field(description="empty the prefix cache before each measurement")] = "try"
    start_timeout_s: Annotated[
        float,
        Field(
            gt=0,
            description="seconds a server may take to be ready, also when it comes back in mid-run "
            "(then 300 at most, where it is given by its URL)",
        ),
    ] = 1800.0
    stop_grace_s: Annotated[float, Field(gt=0, description="seconds between SIGTERM and SIGKILL")] = 30.0


class Price(Settings):
    """What the servers' GPUs cost, in any currency."""

    price_per_gpu_hour: Annotated[
        float | None, Field(gt=0, description="price of one GPU for an hour, for the cost of a million tokens")
    ] = None
    gpus: Annotated[int, Field(ge=1, description="GPUs that each server runs on")] = 1

    def of_a_million(self, tokens_s: float) -> float | None:
        """Cost of a million tokens at so many in a second; None without a price or tokens."""
        if self.price_per_gpu_hour is None or tokens_s <= 0:
            return None
        return self.price_per_gpu_hour * self.gpus / 3600 / tokens_s * 1e6


class Bounds(Settings):
    """What a request may take, how many processes send, and how busy each may be."""

    workers: Annotated[
        int, Field(ge=1, description="client processes that send together; at most one for each client is used")
    ] = 1

    request_timeout_s: Annotated[
        float | None,
        Field(gt=0, description="bound of one request; default: 120 s + 1 s for 100 tokens of prompt and output"),
    ] = None
    stall_timeout_s: Annotated[
        float | None,
        Field(gt=0, description="silence of a stream that counts as a stall; default: the request's bound"),
    ] = None
    sample_s: Annotated[
        float, Field(ge=0, description="seconds between readings of the server's gauges for the timeline; 0 = none")
    ] = 1.0
    max_lag_s: Annotated[
        float, Field(gt=0, description="p99 of event-loop lag or dispatch delay that makes a run invalid")
    ] = 0.05
    max_cpu_share: Annotated[
        float, Field(gt=0, description="share of one CPU used by the client that makes a run invalid")
    ] = 0.9

    def request(self, tokens: int) -> float:
        """Seconds that one request with `tokens` of prompt and output may take."""
        return self.request_timeout_s if self.request_timeout_s is not None else 120.0 + tokens / 100.0


def changed(settings: AnySettings, **fields: object) -> AnySettings:
    """`settings` with other `fields`, checked as they are when they come from the command line."""
    return type(settings).model_validate(settings.model_dump() | fields)


def problem_of(error: Exception, way_out: str = "change it") -> str:
    """The first problem of a model that pydantic refused, in one sentence; what any other error says."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return f"expected JSON, got {first['ctx']['error']}; {way_out}"
    where = ".".join(str(part) for part in first["loc"]) or "settings"
    wanted = (
        first["msg"]
        .replace("Input should be", "a value that is")
        .replace("Extra inputs", "no such setting; extra")
        .replace("Field required", "such a field")
    )
    return f"{where}: expected {wanted}, got {str(first['input'])[:80]!r}; {way_out}"
