"""Index tensors of served prompts, written to files that `bench.selection` and `calibrate` read: `--misa-dump`.

A file holds one prompt in one layer: the keys of the whole prompt as the pool stores them, and the queries and head
gates of some rows of its last chunk. Only extend calls are looked at, never a captured graph. Keys are computed from
what users sent, so folder and files are for their owner alone.
"""

from __future__ import annotations

import fcntl
import logging
import os
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sglang_misa.admission import AdmissionError
from sglang_misa.call import ExtendCall, Span
from sglang_misa.config import Dump
from sglang_misa.dump_folder import LOCK, taken, unwritable
from sglang_misa.kernels.layout import HEAD_DIM
from sglang_misa.metrics import recorder
from sglang_misa.policy_file import ModelIdentity
from sglang_misa.row_sample import one_of_each_part
from sglang_misa.runtime import Runtime

logger = logging.getLogger(__name__)

GIB = 1 << 30
HEADER = 8192  # bytes of a file's header, at most
_NAME = re.compile(r"\.?prompt-(?P<number>\d+)-layer-\d+-rank-(?P<rank>\d+)\.safetensors(?P<part>\.\d+)?")


@dataclass
class FolderDump:
    """Writes to one folder until its limit; a prompt is written in all chosen layers or in none."""

    folder: Path
    settings: Dump
    model: ModelIdentity
    rank: int
    layers: tuple[int, ...]  # that are dumped, in the order in which a step runs them
    _written: int = 0  # bytes, of files of this rank
    _next: int = 0  # number of the next prompt
    _numbers: dict[int, int] = field(default_factory=dict)  # of the requests that end in this step

    def __post_init__(self) -> None:
        """Take the folder. Raises AdmissionError where another server has it, or it fails, here or on this node."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = (self.folder / LOCK.format(self.rank)).open("w")  # held until this process ends
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for file in self.folder.iterdir():
                match = _NAME.fullmatch(file.name)
                if match is None or int(match["rank"]) != self.rank:
                    continue
                if match["part"]:  # of a process that was killed while it wrote
                    file.unlink()
                    continue
                self._written += file.stat().st_size
                self._next = max(self._next, int(match["number"]) + 1)
        except BlockingIOError:
            raise AdmissionError([taken(self.folder)]) from None
        except OSError as error:
            raise AdmissionError([unwritable(self.folder, str(error.strerror))]) from None

    def wants(self, layer: int, spans: Sequence[Span]) -> bool:
        """Whether `take` would write anything of an extend call of `layer`."""
        return layer in self.layers and any(self._ends(span) for span in spans)

    def _ends(self, span: Span) -> bool:
        return span.ends and span.length > self.model.index_topk  # a row that sees no more has nothing to choose

    def take(self, call: ExtendCall) -> None:
        """Write the prompts that end in `call`."""
        if not self.wants(call.layer, call.spans) or _capturing(call.index_q):
            return
        if call.layer == self.layers[0]:
            self._numbers = dict(self._admitted(call))
        for span in call.spans:
            if span.request in self._numbers and self._ends(span):
                try:
                    self._write(self._numbers[span.request], call, span)
                except OSError as error:
                    self._stop(error)
                    return

    def _stop(self, error: OSError) -> None:
        """Write nothing from now on, and leave no prompt of this step that lacks a layer: serving goes on."""
        logger.error("--misa-dump: expected to write to %s, got %s; nothing more is dumped", self.folder, error)
        self.layers = ()
        for number in self._numbers.values():
            with suppress(OSError):  # of a disk that fails
                for file in self.folder.glob(f"prompt-{number:05}-layer-*-rank-{self.rank}.safetensors"):
                    file.unlink()
        recorder.dump["prompts"] -= len(self._numbers)
        recorder.dump["left_out"] += len(self._numbers)
        recorder.dump["stopped"] = 1

    def _admitted(self, call: ExtendCall) -> Iterator[tuple[int, int]]:
        """(request, number) of the prompts that fit under the limit with all their layers."""
        for span in filter(self._ends, call.spans):
            rows = len(self._rows(span, self._next))
            heads = self.model.index_heads
            size = span.length * (HEAD_DIM + 4) + rows * (heads * (HEAD_DIM + 4) + 4) + HEADER
            if self._written + size * len(self.layers) > self.settings.gib * GIB:
                if not recorder.dump["left_out"]:
                    logger.warning(
                        "--misa-dump: a prompt of %d tokens is left out, as is any that would exceed --misa-dump-gib "
                        "%g in %s",
                        *(span.length, self.settings.gib, self.folder),
                    )
                recorder.dump["left_out"] += 1
                continue
            self._written += size * len(self.layers)
            recorder.dump["prompts"] += 1
            yield span.request, self._next
            self._next += 1

    def _rows(self, span: Span, number: int) -> list[int]:
        """Rows of the call that see more than the top k: one drawn of each of equal parts, the last row of the last."""
        rows = range(span.gate(self.model.index_topk), span.last_row)
        if not rows:
            return []
        drawn = one_of_each_part(rows, min(self.settings.rows, len(rows)), random.Random(number))
        return [*drawn[:-1], rows[-1]]

    def _write(self, number: int, call: ExtendCall, span: Span) -> None:
        rows = torch.tensor(self._rows(span, number), device=call.index_q.device)
        keys = slice(span.first_key, span.first_key + span.length)
        tensors = {
            "index_q": call.index_q.view(torch.uint8)[rows].view(torch.float8_e4m3fn),  # fp8 has no index kernel
            "head_gates": call.head_gates[rows].float(),
            "index_k": call.index_k[keys],
            "k_scale": call.k_scale[keys],
            "positions": (rows + (span.length - span.last_row)).int(),
        }
        facts = {"model": self.model.model_dump_json(), "layer": str(call.layer), "prompt": str(number)}
        name = f"prompt-{number:05}-layer-{call.layer:03}-rank-{self.rank}.safetensors"
        write_new(self.folder / name, tensors, facts)


def write_new(path: Path, tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    """Write a safetensors file for its owner alone, whole or not at all. Raises FileExistsError where there is one."""
    from safetensors.torch import save

    part = path.with_name(f".{path.name}.{os.getpid()}")
    file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(file, "wb") as stream:
            stream.write(save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, facts))
        os.link(part, path)  # unlike a rename, this never replaces
    finally:
        part.unlink()


def dump_for(runtime: Runtime, index_k_pages: Sequence[Tensor]) -> FolderDump | None:
    """What dumps the layers of a pool, None where nothing does: of ranks that select for the same requests one does."""
    settings, held = runtime.config.dump, len(index_k_pages)
    if settings.path is None or runtime.model is None or not runtime.is_target(held) or not runtime.leads:
        return None
    chosen = range(held) if settings.layers is None else sorted(set(settings.layers))
    layers = tuple(layer for layer in chosen if len(index_k_pages[layer]))
    return FolderDump(settings.path, settings, runtime.model, runtime.rank, layers)


def _capturing(tensor: Tensor) -> bool:
    return bool(tensor.is_cuda and torch.cuda.is_current_stream_capturing())
