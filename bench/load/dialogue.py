"""A conversation as requests to one server: the body of each turn, and the expected prefix-cache hits."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic_core import to_json

from sglang_misa.bench.load.control import Control
from sglang_misa.bench.load.prompts import Ids
from sglang_misa.bench.load.replies import Reply
from sglang_misa.bench.load.settings import Protocol, Workload
from sglang_misa.bench.load.workload import LEAD, Conversation, Turn

CHAT_FITS = 6  # rounds of fitting a chat's text to its token count
Messages = list[dict[str, str]]


class Encoder:
    """Turns prompts into request bodies for one server."""

    def __init__(self, control: Control, protocol: Protocol, workload: Workload):
        self.control = control
        self.api = protocol.api
        self._extras = protocol.openai_extras
        self._workload = workload

    def body(self, prompt: Ids | Messages, output_len: int) -> bytes:
        """JSON body that asks for `output_len` tokens after token ids, or after the messages of a chat."""
        ignore_eos = {"ignore_eos": self._workload.ignore_eos} if self._extras or self.api == "generate" else {}
        sampling = {"temperature": self._workload.temperature, **ignore_eos}
        content = prompt if isinstance(prompt, list) else prompt.tolist()
        if self.api == "generate":
            data: dict[str, Any] = {
                "input_ids": content,
                "sampling_params": {"max_new_tokens": output_len, **sampling},
                "stream": True,
            }
        else:
            data = {
                "model": self.control.model,
                "messages" if self.api == "chat" else "prompt": content,
                "max_tokens": output_len,
                "stream": True,
                "stream_options": {"include_usage": True, **({"continuous_usage_stats": True} if self._extras else {})},
                **sampling,
            }
        return to_json(data)  # ten times as fast as json on token ids, and so kinder to the event loop beside it

    def message(self, ids: Ids, keep: int) -> dict[str, str]:
        """A user message of `len(ids)` tokens, its template included: tokens after the first `keep` are left out."""
        cut = 0
        for _ in range(CHAT_FITS):
            text = self.control.detokenize(np.concatenate([ids[:keep], ids[keep + cut :]]).tolist())
            message = {"role": "user", "content": text}
            over = self.control.count_chat([message]) - len(ids)
            if over == 0 or cut + over < 0:
                break
            cut += over
        return message


class Dialogue:
    """One conversation in progress. `in_cache` counts the tokens whose keys the server has computed for it so far."""

    def __init__(self, conversation: Conversation, encoder: Encoder):
        self.conversation = conversation
        self._encoder = encoder
        self._ids: Ids = np.empty(0, np.int32)
        self._messages: Messages = []
        self.in_cache = conversation.shared
        self.prompt_len = 0

    def body(self, turn: Turn) -> bytes:
        """The body of the next request."""
        if self._encoder.api == "chat":
            keep = self.conversation.shared + LEAD if not self._messages else 0
            self._messages.append(self._encoder.message(turn.ids, keep))
            self.prompt_len += len(turn.ids)
            return self._encoder.body(self._messages, turn.output_len)
        self._ids = np.concatenate([self._ids, turn.ids])
        self.prompt_len = len(self._ids)
        return self._encoder.body(self._ids, turn.output_len)

    def hear(self, reply: Reply) -> None:
        """Add the server's answer. Without its ids the text is tokenized again, so only the prompt counts as cached."""
        self.in_cache = self.prompt_len
        if self._encoder.api == "chat":
            self._messages.append({"role": "assistant", "content": reply.text})
            self.prompt_len += reply.completion_tokens or 0
        elif reply.output_ids:
            self._ids = np.concatenate([self._ids, np.array(reply.output_ids, np.int32)])
            self.in_cache = len(self._ids) - 1  # the last token was returned, not run
        elif reply.text:
            self._ids = np.concatenate([self._ids, np.array(self._encoder.control.tokenize(reply.text), np.int32)])
