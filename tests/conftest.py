"""Kernels run on the GPU where there is one, else on CPU tensors through Triton's interpreter."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated: before any of them is imported


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and its kin return NaN (integers: their minimum, bytes 0xFF), so that a forgotten tail shows."""

    def poison(dtype: torch.dtype) -> float:
        if dtype.is_floating_point:
            return float("nan")
        return 0xFF if dtype == torch.uint8 else torch.iinfo(dtype).min

    def poisoned(create: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = create(*args, **kwargs)
            return tensor.fill_(poison(tensor.dtype))

        return wrapper

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
