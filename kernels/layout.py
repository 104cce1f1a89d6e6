"""What the kernels expect of the tensors they are handed, checked before a launch."""

from __future__ import annotations

import torch


def expect(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, *, row_stride: bool = False
) -> None:
    """Raise ValueError unless `tensor` has this shape and dtype and is contiguous.

    row_stride: rows may lie apart (a slice of wider rows), as long as each row is packed.
    """
    packed = tensor.numel() == 0 or tensor.stride(-1) == 1 if row_stride else tensor.is_contiguous()
    if tensor.dtype != dtype or tuple(tensor.shape) != shape or not packed:
        layout = "rows packed" if row_stride else "contiguous"
        raise ValueError(
            f"{name}: expected {dtype} of shape {shape}, {layout}, got {tensor.dtype} of shape {tuple(tensor.shape)} "
            f"with strides {tensor.stride()}"
        )
