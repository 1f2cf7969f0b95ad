"""Weights and scales out of FlashInfer's arguments, by the formulas that its kernels index with.

Nothing here is shared with the code that prepares those arguments. Sources, in flashinfer-python
0.7.2.post1: `quantization_utils.cuh:995` (128x4), `utils.py:1053` (the shuffle of 32 rows),
`fused_moe/core.py:548` (rows of up and gate in turn), `fused_moe/prepare.py:2495` (64 of each in turn),
`cute_dsl/utils.py:367` (the 6-D view of the scales).
"""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch

from nvfp4_moe.reference.moe.routing import Routing, RoutingMethodType

Weights = tuple[torch.Tensor, torch.Tensor]
"""(codes [E, M, K/2] uint8, block scales [E, M, K/16] e4m3 bytes), rows in their natural order."""


def routing(method: int, *rest: Any) -> Routing:
    """Return the routing of FlashInfer's arguments, which come in the order of the fields."""
    return Routing(RoutingMethodType(method), *rest)


def _at_128x4(row: torch.Tensor, block: torch.Tensor, blocks: int) -> torch.Tensor:
    tile = row // 128 * (-(-blocks // 4)) + block // 4
    return tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4


def unswizzled(scales: torch.Tensor, rows: int, blocks: int) -> torch.Tensor:
    """[E, rows, blocks] bytes of scales in 128x4, expert by expert, of whatever shape."""
    flat = scales.view(torch.uint8).reshape(scales.shape[0], -1)
    row, block = torch.arange(rows)[:, None], torch.arange(blocks)[None, :]
    return flat[:, _at_128x4(row, block, blocks)]


def trtllm(codes: torch.Tensor, scales: torch.Tensor, gated: bool) -> Weights:
    rows, half = codes.shape[1:]
    place = trtllm_rows(rows, gated)
    return codes[:, place], unswizzled(scales, rows, half // 8)[:, place]


def trtllm_rows(rows: int, gated: bool) -> torch.Tensor:
    """Return the place of each natural row in the shuffled matrix."""
    r = torch.arange(rows)
    if gated:  # row i of either half is the i-th pair's
        half = rows // 2
        r = torch.where(r < half, 2 * r, 2 * (r - half) + 1)
    within = r % 32
    return r // 32 * 32 + within % 4 * 8 + within // 4


def cute_dsl(codes: torch.Tensor, scales: torch.Tensor, gated: bool) -> Weights:
    """scales: [32, 4, M/128, 4, K/64, E], as `blockscaled_contiguous_*.py` index them."""
    rows, half = codes.shape[1:]
    r, block = torch.arange(rows), torch.arange(half // 8)[None, :]
    if gated:  # 64 rows of up, then 64 of gate
        of_gate, i = r // (rows // 2), r % (rows // 2)
        r = i // 64 * 128 + of_gate * 64 + i % 64
    row = r[:, None]
    bytes_ = scales.view(torch.uint8)
    linear = bytes_[row % 32, row % 128 // 32, row // 128, block % 4, block // 4]
    return codes[:, r], linear.permute(2, 0, 1)


def cutlass(packed: torch.Tensor, scales: torch.Tensor) -> Weights:
    codes = packed.view(torch.uint8)
    return codes, unswizzled(scales, codes.shape[1], codes.shape[2] // 8)


def rows_of_scales(scales: torch.Tensor, tokens: int) -> torch.Tensor:
    """[T, K/16] e4m3 of linear scales of any shape and type."""
    return scales.view(torch.uint8).reshape(tokens, -1).view(torch.float8_e4m3fn)
