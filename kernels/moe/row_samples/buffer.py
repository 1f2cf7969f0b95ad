"""Copy some rows of a layer call into fixed memory, at every so many calls, inside a CUDA graph.

The count of calls lies on the device, so the kernel decides at each replay whether it copies. A host
that reads the memory later sees by the counts whether it has one whole sample: `BEGUN` and `DONE` are
equal then, and stay so while it reads.
"""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass

import torch

CALLS, BEGUN, DONE, TOKENS, FIRST = range(5)
"""Places in `RowBuffer.counts`: calls so far; samples begun; samples done; T and the first row of the
last sample."""
STEP = 7919
"""Rows between the first ones of two samples that follow one another; prime, so that all come up."""


@dataclass(frozen=True)
class RowBuffer:
    """Memory for R rows of a call. All of it is allocated before a graph is captured."""

    counts: torch.Tensor  # [5] int64
    hidden_states: torch.Tensor  # [R, H] bf16
    ids: torch.Tensor  # [R, K] int32
    weights: torch.Tensor  # [R, K] bf16 or fp32
    output: torch.Tensor  # [R, H] of the output's dtype

    @classmethod
    def like(cls, rows: int, *tensors: torch.Tensor) -> "RowBuffer":
        """Allocate memory for rows of tensors [T, ...]: hidden states, ids, weights, output."""
        device = tensors[0].device
        counts = torch.zeros(5, dtype=torch.int64, device=device)
        return cls(counts, *(t.new_zeros(rows, t.shape[1]) for t in tensors))

    @property
    def rows(self) -> tuple[torch.Tensor, ...]:
        return self.hidden_states, self.ids, self.weights, self.output


def row_numbers(taken: int, rows: int, tokens: int) -> list[int]:
    """Return the rows of a call of `tokens` that a sample has, after `taken` others."""
    first = taken * STEP % tokens
    return [(first + i) % tokens for i in range(min(rows, tokens))]


def take_rows(
    buffer: RowBuffer, tensors: tuple[torch.Tensor, ...], period: int, phase: int
) -> None:
    """Count a call on the device, and copy rows of it if it is the first, or `phase` in its period.

    One launch of one program, on the current stream; nothing is allocated and nothing waits.

    Args:
        tensors: hidden states, ids, weights, output, [T, ...] each, T at least 1, with the dtypes and
            widths of the buffer; the elements of a row are adjacent.
    """
    from ...launcher import launch, next_power_of_2  # the canary runs without Triton on a CPU
    from ...triton_target import arch, launch_options
    from .kernel import take_kernel

    words = [t.view(torch.int16) for t in tensors]
    kept = [t.view(torch.int16) for t in buffer.rows]
    device = buffer.counts.device
    chunk = min(2048, next_power_of_2(max(t.shape[1] for t in words)))
    launch(take_kernel, (1,),
        buffer.counts,
        *words, *kept,
        *(t.stride(0) for t in words), *(t.shape[1] for t in words),
        tensors[0].shape[0], period, phase,
        ROWS=buffer.ids.shape[0], STRIDE=STEP, CHUNK=chunk, ARCH=arch(device), num_warps=4,
        **launch_options(device),
    )  # fmt: skip
