"""The weighted sum over the experts of a token, in FlashInfer's order of additions.

Sources, in flashinfer-python 0.7.2.post1: `trtllm_fused_moe_dev_kernel.cu:678-1165`, which is built with
-use_fast_math, and `fused_moe/cute_dsl/blackwell/moe_finalize.py:32`, which writes `fma.rn.ftz` out; in
0.7.4, where that is another: `moe_finalize.py:25-200`. The tests compare with outputs of the kernels of
0.7.2, and of CUTLASS', on an H200.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from typing import Literal

import torch

from ..numerics.accumulate import fma
from ..numerics.fp32 import flush
from ..numerics.subnormals import kept

FinalizeOrder = Literal["flashinfer", "slot", "slot-multiply"]
"""TRT-LLM's, which depends on the number of tokens; slot by slot, from +0; slot by slot, and slot 0 is a
multiplication, as in CuTe-DSL since 0.7.4: a sum of -0 alone keeps its sign."""


@kept
def finalize(
    rows: torch.Tensor,
    weights: torch.Tensor,
    order: FinalizeOrder,
    is_local: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum rows [T, K, H] fp32 times weights [T, K] to [T, H], by fused multiply-adds in a fixed order.

    Subnormal rows, weights and sums are zeros of their sign, but for "slot-multiply". H, on which
    FlashInfer's order depends, is the width of the output, without what pads the rows
    (`trtllm_fused_moe_runner.cu:562`).

    Args:
        is_local: [T, K] bool, the slots that are added; None: all. Weights of the others are not read,
            so that a NaN or an infinity there does not show (`trtllm_fused_moe_dev_kernel.cu:701`,
            `:925`, `:947`, `:1036-1046`: permuted index -1 is skipped).
    """
    flushed = flushes(order)
    return add_up(flushed(rows), flushed(weights.float()), order, is_local)


def flushes(order: FinalizeOrder) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function that an order applies to every fp32 number that it reads or writes."""
    return _as_it_is if order == "slot-multiply" else flush


def _as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x


def add_up(
    rows: torch.Tensor,
    weights: torch.Tensor,
    order: FinalizeOrder,
    is_local: torch.Tensor | None = None,
) -> torch.Tensor:
    """The sums of `finalize`, of rows and weights of which subnormal numbers are flushed."""
    tokens, top_k, hidden_size = rows.shape
    groups = split_k_groups(tokens, top_k, hidden_size) if order == "flashinfer" else 1
    multiplies_first, flushed = order == "slot-multiply", flushes(order)
    total: torch.Tensor | None = None
    for j in range(groups):
        part = torch.zeros_like(rows[:, 0]) if top_k else rows.new_zeros(tokens, rows.shape[-1])
        for k in range(j, top_k, groups):
            # -0 is what an addition leaves as it is, so that slot 0 is only multiplied.
            onto = torch.full_like(part, -0.0) if multiplies_first and k == 0 else part
            added = fma(weights[:, k, None], rows[:, k], onto, ftz=not multiplies_first)
            part = added if is_local is None else torch.where(is_local[:, k, None], added, part)
        total = part if total is None else flushed(total + part)
    assert total is not None
    return total


def split_k_groups(tokens: int, top_k: int, hidden_size: int) -> int:
    """Return how many strided groups of slots FlashInfer's finalize sums apart; 1: ascending slots.

    `trtllm_fused_moe_dev_kernel.cu:1145-1165`; numerics.md has the rule: few tokens, 4 < K <= 64.
    """
    blocks = -(-hidden_size // 256) * min(tokens, 8192)
    if blocks >= 1184 or not 4 < top_k <= 64 or hidden_size % 8:
        return 1
    groups = 1
    while 4 * groups < top_k:
        groups *= 2
    return groups
