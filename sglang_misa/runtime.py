"""The state of one rank: what its hooks select with. Armed once, by the hook on ModelRunner.load_model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import distributed

from sglang_misa.admission import AdmissionError
from sglang_misa.config import MisaConfig
from sglang_misa.policy_file import ModelIdentity


@dataclass(frozen=True)
class Runtime:
    """What the hooks of this process select with."""

    config: MisaConfig
    index_heads: int  # H
    topk: int  # k
    row_len: int  # tokens of a request that a page table holds, at most
    device: str
    rank: int
    ranks: int
    model: ModelIdentity | None = None  # the target's; None where nothing asks for it
    peers: Any = None  # process group of the ranks that select for the same requests, of more than one

    @property
    def leads(self) -> bool:
        """Whether this is the first of the ranks that select for the same requests."""
        return self.peers is None or distributed.get_rank(self.peers) == 0

    def is_target(self, layers: int) -> bool:
        """Whether a KV pool of so many layers is the target model's, not a draft's."""
        return self.model is None or layers == self.model.layers

    @property
    def kernels(self) -> bool:
        """Whether the GPU kernels select, not the PyTorch reference."""
        return self.config.on_kernels(self.device)


_runtime: Runtime | None = None


def arm(runtime: Runtime) -> None:
    """Make `runtime` the one that the hooks read. Twice with the same values is fine; AdmissionError with others."""
    global _runtime
    if _runtime not in (None, runtime):
        raise AdmissionError([f"expected one runtime a process, {_runtime}, got {runtime}; start another server"])
    _runtime = runtime


def current() -> Runtime:
    """What the hooks select with. Raises AdmissionError before `arm`."""
    if _runtime is None:
        raise AdmissionError(["expected an armed process, got a hook called before ModelRunner.load_model"])
    return _runtime
