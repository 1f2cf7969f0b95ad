"""TRT-LLM's row orders of weights, and their inverses.

Each function returns int64 indices `i` such that `w[i]` is the reordered matrix (and scales, biases,
per-row scales alike). Source: flashinfer-python 0.7.2, `utils.py:1053-1120` (shuffle) and
`fused_moe/core.py:548` (gated interleave).
"""

# SPDX-License-Identifier: Apache-2.0
import torch


def shuffle_rows(
    rows: int, epilogue_tile_m: int = 128, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Order in which the GEMM's epilogue wants the rows of its A operand.

    Within each group of 32 rows (16 if `epilogue_tile_m` is no multiple of 128), row 4a + b (2a + b)
    goes to place 8b + a.

    Raises:
        ValueError: `rows` is no multiple of the group.
    """
    group = 32 if epilogue_tile_m % 128 == 0 else 16
    if rows % group:
        raise ValueError(f"rows is {rows}; the row shuffle needs a multiple of {group}")
    order = (
        torch.arange(group, dtype=torch.int64, device=device).reshape(8, group // 8).T.reshape(-1)
    )
    return (
        torch.arange(0, rows, group, dtype=torch.int64, device=device)[:, None] + order
    ).reshape(-1)


def interleave_gated_rows(rows: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """[first half; second half] to row 0 of each half, row 1 of each half, ...

    Raises:
        ValueError: `rows` is odd.
    """
    if rows % 2:
        raise ValueError(f"rows is {rows}; a gated matrix has an even number")
    return torch.arange(rows, dtype=torch.int64, device=device).reshape(2, rows // 2).T.reshape(-1)


def inverse(indices: torch.Tensor) -> torch.Tensor:
    """The indices that undo `indices`: `w[indices][inverse(indices)]` is `w`."""
    undo = torch.empty_like(indices)
    undo[indices] = torch.arange(indices.numel(), dtype=torch.int64, device=indices.device)
    return undo
