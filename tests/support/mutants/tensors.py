"""Small changes of tensors, that mutants make."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable

import torch

Tensor = torch.Tensor
Change = Callable[[Tensor], Tensor]


def next_row(t: Tensor) -> Tensor:
    """Each row, or scalar, is its neighbour's."""
    return t.roll(1, 0)


def swap_nibbles(codes: Tensor) -> Tensor:
    return codes >> 4 | codes << 4


def of_bytes(f: Change) -> Change:
    """f of e4m3 as bytes."""
    return lambda t: f(t.view(torch.uint8)).view(t.dtype)


def of_one(f: Change) -> Change:
    """f of one element: the largest byte, or the one in the middle."""

    def change(t: Tensor) -> Tensor:
        flat = t.clone().view(-1)
        at = int(flat.int().argmax()) if t.dtype == torch.uint8 else flat.numel() // 2
        flat[at : at + 1] = f(flat[at : at + 1])
        return flat.view(t.shape)

    return change


def more(scales: Tensor) -> Tensor:
    """The next larger scale."""
    return torch.where(scales == 0, 0, (scales + 1).clamp(max=0x7E)).to(torch.uint8)


def less(scales: Tensor) -> Tensor:
    """The next smaller scale."""
    return torch.where(scales == 0, 0, scales - 1).to(torch.uint8)


def without_subnormals(scales: Tensor) -> Tensor:
    return torch.where(scales < 0x08, 0, scales).to(torch.uint8)


def flip(codes: Tensor) -> Tensor:
    """The lowest bit of the even element."""
    return codes ^ 1


def first_block_dropped(scales: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(scales[..., :1]), scales[..., 1:]], -1)
