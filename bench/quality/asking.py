"""Request of one greedy answer, with log-probabilities and selected positions where they are asked for."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError
from pydantic_core import from_json

from sglang_misa.bench.load.client import PATHS
from sglang_misa.bench.load.control import Control
from sglang_misa.bench.load.settings import LoadError, Protocol
from sglang_misa.bench.quality.questions import Question

GO_ON = "repeat the same command with --out"
TOP = 20  # log-probabilities of a token


class Answer(BaseModel):
    """What a server said. top: for each new token, token → log-probability; empty where the server gives none."""

    model_config = ConfigDict(frozen=True)

    arm: str
    question: str  # its digest
    text: str
    ids: tuple[int, ...] = ()
    top: tuple[dict[str, FiniteFloat], ...] = ()
    seconds: float = 0.0
    prompt_tokens: int = 0  # as the server counts them; 0 where it does not say


def ask(
    control: Control, protocol: Protocol, question: Question, bound_s: float, **extra: Any
) -> tuple[dict[str, Any], float]:
    """The server's JSON answer to `question`, greedy, and its seconds; a busy server is asked again after a pause.

    Raises LoadError, and requests.RequestException without an answer.
    """
    body = _body(control, protocol, question) | extra
    status, content, seconds = control.call_patiently("POST", PATHS[protocol.api], body=body, limit_s=bound_s)
    if status != 200:
        said = content[:300].decode("utf-8", "replace")
        raise LoadError(
            f"{control.url}: expected an answer to {question.name}, got HTTP {status}: {said}; mend it; what was "
            f"answered is kept: {GO_ON}"
        )
    try:
        return from_json(content), seconds
    except ValueError:
        raise LoadError(f"{control.url}: expected a JSON answer, got {content[:60]!r}; check the address") from None


def _body(control: Control, protocol: Protocol, question: Question) -> dict[str, Any]:
    if protocol.api == "generate":
        sampling = {"max_new_tokens": question.new_tokens, "temperature": 0}
        return {"input_ids": question.ids, "sampling_params": sampling}
    common = {"model": control.model, "max_tokens": question.new_tokens, "temperature": 0}
    if protocol.api == "completions":
        return {**common, "prompt": question.ids}
    return {**common, "messages": [{"role": "user", "content": control.detokenize(question.ids)}]}


def read(raw: dict[str, Any], protocol: Protocol, arm: str, question: Question, seconds: float) -> Answer:
    """What of an answer is kept. Raises LoadError for a body of another kind, and for one to other ids than were sent.

    Of a chat the server makes the ids, and how many it makes is not known here; nor is it where a server does not say.
    """
    try:
        if protocol.api == "generate":
            meta = raw["meta_info"]
            ids, tokens = tuple(raw.get("output_ids") or ()), meta.get("prompt_tokens")
            rows = meta.get("output_top_logprobs") or []
            top = tuple({str(token): value for value, token, *_ in row or ()} for row in rows)
            text = raw["text"]
        else:
            choice = raw["choices"][0]
            tokens, ids = (raw.get("usage") or {}).get("prompt_tokens"), ()
            text = choice["message"]["content"] if protocol.api == "chat" else choice["text"]
            told = choice.get("logprobs") or {}
            rows = told.get("top_logprobs") or [
                {entry["token"]: entry["logprob"] for entry in one["top_logprobs"]} for one in told.get("content") or ()
            ]
            top = tuple(row or {} for row in rows)
        answer = Answer(
            arm=arm,
            question=question.digest(),
            text=text or "",
            ids=ids,
            top=top,
            seconds=seconds,
            prompt_tokens=0 if tokens is None else tokens,
        )
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise LoadError(
            f"arm {arm}: expected an answer by --api {protocol.api}, got {str(raw)[:200]} ({why}); choose another"
        ) from None
    if protocol.api != "chat" and tokens is not None and answer.prompt_tokens != len(question.ids):
        raise LoadError(
            f"arm {arm}: expected {len(question.ids)} prompt tokens of {question.name}, as sent, got "
            f"{answer.prompt_tokens}; the server cuts prompts off, or is behind a proxy that changes them: mend that"
        )
    return answer


def wants_logprobs(protocol: Protocol) -> dict[str, Any]:
    """Fields that ask for log-probabilities."""
    if protocol.api == "generate":
        return {"return_logprob": True, "top_logprobs_num": TOP}
    return {"logprobs": True, "top_logprobs": TOP} if protocol.api == "chat" else {"logprobs": TOP}


def selected(raw: dict[str, Any], topk: int, arm: str) -> NDArray[np.int32]:
    """Positions [rows, layers, topk] int32 that the server attended to, -1 for none. Raises LoadError."""
    meta = raw.get("meta_info") or {}
    coded = meta.get("indexer_topk")
    if not coded:
        raise LoadError(
            f"arm {arm}: expected selected positions, got an answer without indexer_topk; start SGLang with "
            "--enable-return-indexer-topk, or read the audit: --audit"
        )
    flat = np.frombuffer(base64.b64decode(coded), dtype=np.int32)
    rows = meta["prompt_tokens"] + meta["completion_tokens"] - 1
    if rows <= 0 or flat.size % (rows * topk):
        raise LoadError(
            f"arm {arm}: expected {rows} rows of a multiple of {topk} positions, got {flat.size} in all; "
            "set --index-topk to the model's index_topk"
        )
    found = flat.reshape(rows, -1, topk)
    first = sorted({*(found[0] >= 0).sum(1).tolist()})
    if first not in ([0], [1]):  # it sees itself: by another top-k a layer would be a part of one, or several
        raise LoadError(
            f"arm {arm}: expected the first row of each layer to attend to itself, got {' to '.join(map(str, first))} "
            "positions; set --index-topk to the model's index_topk"
        )
    own = np.arange(rows)[:, None, None]
    if (found > own).any():
        row = int((found > own).any((1, 2)).argmax())
        raise LoadError(
            f"arm {arm}: expected positions that a row sees, got {found[row].max()} in row {row}; start SGLang with "
            "SGLANG_DSA_FUSE_TOPK=0 in its environment: it tells slots of its pool otherwise"
        )
    return found
