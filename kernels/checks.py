"""What the kernels expect of the tensors they are handed, checked before a launch."""

from __future__ import annotations

import torch

from sglang_misa.kernels.layout import INDEX_HEADS, PAGE, ROUTERS


def expect(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int | None, ...],
    *dtypes: torch.dtype,
    row_stride: bool = False,
    cuda: bool = False,
    device: torch.device | None = None,
) -> None:
    """Raise ValueError unless `tensor` has this shape (None: any size), one of `dtypes`, and is contiguous.

    row_stride: rows may lie apart (a slice of wider rows), as long as each row is packed; cuda: on a GPU; device: on
    this one, where another tensor of the call is.
    """
    got = tensor.shape  # nearly always as expected to the last number: several checks an operation, each layer
    same = got == shape or (len(got) == len(shape) and all(w in (None, g) for w, g in zip(shape, got, strict=True)))
    packed = tensor.numel() == 0 or tensor.stride(-1) == 1 if row_stride else tensor.is_contiguous()
    there = (tensor.is_cuda or not cuda) and device in (None, tensor.device)
    if not (same and packed and there and tensor.dtype in dtypes):
        place = ", on a GPU" if cuda else "" if device is None else f", on {device}"
        layout = ("rows packed" if row_stride else "contiguous") + place
        raise ValueError(
            f"{name}: expected {' or '.join(map(str, dtypes))} of shape {shape}, {layout}, got {tensor.dtype} of shape "
            f"{tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
        )


def expect_index_heads(index_heads: int) -> None:
    """Raise ValueError unless the kernels are built for models of so many index heads."""
    if index_heads not in INDEX_HEADS:
        raise ValueError(f"index_q: expected {' or '.join(map(str, INDEX_HEADS))} index heads, got {index_heads}")


def expect_router(router: str, *, routed: bool, residual: bool) -> None:
    """Raise ValueError unless `router` is one that can rank the heads, where any are `routed`."""
    if router not in ROUTERS:
        raise ValueError(f"router: expected one of {', '.join(ROUTERS)}, got {router!r}")
    if router == "error" and routed and not residual:
        raise ValueError("router: expected a residual with error, which ranks heads by what that gets wrong, got none")


def expect_heads(heads: int, index_heads: int, *, residual: bool) -> None:
    """Raise ValueError unless `heads` of `index_heads` can be routed, and leave one to a residual."""
    if not 1 <= heads <= index_heads - residual:
        most = (
            f"{index_heads - 1}, which leaves a head to the residual"
            if residual
            else f"the model's {index_heads} index heads"
        )
        raise ValueError(f"heads: expected 1 to {most}, got {heads}")


def expect_page_table(page_table: torch.Tensor, seq_lens: torch.Tensor) -> tuple[int, int]:
    """(B, W) of a page table. Raises ValueError unless it is int32 [B, W] with rows packed, and seq_lens int32 [B]."""
    if page_table.dim() != 2 or page_table.dtype != torch.int32 or page_table.stride(1) != 1:
        raise ValueError(
            f"page_table: expected int32 [B, W] with unit column stride, got {page_table.dtype} of shape "
            f"{tuple(page_table.shape)} with strides {page_table.stride()}; pass physical page ids, not token slots"
        )
    rows, width = page_table.shape
    expect("seq_lens", seq_lens, (rows,), torch.int32)
    return rows, width


def expect_block_size(block_size: int) -> None:
    """Raise ValueError unless blocks of `block_size` tokens are whole pages."""
    if block_size < PAGE or block_size % PAGE:
        raise ValueError(f"block_size: expected a positive multiple of {PAGE}, got {block_size}")


def expect_blocks(blocks: int, block_size: int, k: int) -> None:
    """Raise ValueError unless `blocks` blocks hold the first and the newest one, and k tokens."""
    expect_block_size(block_size)
    if blocks < 2 or blocks * block_size < k:
        raise ValueError(
            f"blocks: expected 2 or more, of k = {k} tokens or more in all, got {blocks} of {block_size}; change the "
            "number of blocks"
        )
