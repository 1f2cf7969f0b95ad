"""Products of rows that lie sorted by expert with the matrices of their experts.

torch has a grouped GEMM, `torch.nn.functional.grouped_mm`. Its kernel exists for bf16 with bf16 results
on compute capability 9.0 and 10.x, and does not wait for the GPU. Everywhere else torch itself loops
over the groups (`GroupedBlas.cpp`, `GroupedMMUtils.h`), and refuses rows whose stride is no multiple of
16 bytes. So the loop here is as fast, and takes everything.
"""

# SPDX-License-Identifier: Apache-2.0
from typing import NamedTuple

import torch

from ..kernels.device import of_device
from ..reference.moe.permute import local_slots


class Slots(NamedTuple):
    """The N = T K slots of a call, sorted by their experts; those of no expert are the last rows.

    What a product gives for the rows of no expert is undefined, so that nothing may add them up.
    """

    slot: torch.Tensor  # [N] int64: token * K + k, of each row
    token: torch.Tensor  # [N] int64
    expert: torch.Tensor  # [N] int64; some expert for a row of none
    ends: torch.Tensor  # [E] int32: the last row of each expert, + 1
    row: torch.Tensor  # [T, K] int64: where each slot lies
    is_local: torch.Tensor  # [T, K] bool: it has an expert

    def by_slot(self, rows: torch.Tensor) -> torch.Tensor:
        """Return [T, K, ...] of rows [N, ...], zeros in slots of no expert."""
        is_local = self.is_local.view(*self.is_local.shape, *(1,) * (rows.dim() - 1))
        return torch.where(is_local, rows[self.row], 0)

    def sums_by_token(self, rows: torch.Tensor) -> torch.Tensor:
        """Add up the slots of each token: [T, M] of the dtype of rows [N, M], of fp32 sums."""
        if rows.dtype == torch.bfloat16 and runs_triton(rows):
            from ..kernels.moe.finalize import finalize  # Triton, which a CPU does not need

            row = torch.where(self.is_local, self.row, -1).int().flatten()
            ones = torch.ones(self.row.shape, dtype=torch.float32, device=rows.device)
            total = rows.new_empty(self.row.shape[0], rows.shape[1], dtype=rows.dtype)
            finalize(rows, row, ones, total, "slot-multiply")  # it flushes no subnormals
            return total
        return self.by_slot(rows).sum(1, dtype=torch.float32).to(rows.dtype)


def sort_slots(ids: torch.Tensor, num_experts: int) -> Slots:
    """Sort slots by expert, stably, without waiting for the GPU.

    Args:
        ids: [T, K] int32; one below 0 or from num_experts on is no expert's.
    """
    is_local = local_slots(ids, num_experts)
    # A radix sort of int32 takes half the passes of int64.
    expert, slot = torch.where(is_local, ids, num_experts).flatten().sort(stable=True)
    each = torch.arange(num_experts, dtype=torch.int32, device=ids.device)
    ends = torch.searchsorted(expert, each, right=True, out_int32=True)
    row = torch.empty_like(slot)
    row[slot] = torch.arange(slot.numel(), dtype=torch.int64, device=ids.device)
    token = torch.div(slot, ids.shape[1], rounding_mode="floor")
    expert = expert.clamp(max=num_experts - 1).long()
    return Slots(slot, token, expert, ends, row.view(ids.shape), is_local)


def operand_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype that operands are rounded to: bf16 on GPUs that multiply it, else fp32.

    bf16 operands and fp32 sums are what a trainer's own GEMMs have; fp32 products would take 13 times as
    long on an H200 (67 against 989 TFLOP/s, NVIDIA's data sheet).
    """
    capability = of_device(device)
    return torch.float32 if capability is None or capability < (8, 0) else torch.bfloat16


def runs_triton(t: torch.Tensor) -> bool:
    """Return True if Triton's kernels take the tensor; a test in the interpreter replaces this."""
    return t.is_cuda


def has_kernel(device: torch.device) -> bool:
    """Return True if torch has a kernel of the grouped GEMM in bf16 for the device."""
    capability = of_device(device)
    return capability is not None and (capability == (9, 0) or capability[0] == 10)


def times(rows: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Multiply the rows of each expert by its matrix.

    Args:
        rows: [N, K]; matrices: [E, K, M]. bf16 or fp32: of two dtypes the first, which is fp32, is that
            of both.
        ends: [E] int32.

    Returns:
        [N, M] of rows' dtype. Rows from ends[-1] on are undefined.
    """
    if rows.dtype == matrices.dtype == torch.bfloat16 and has_kernel(rows.device):
        return torch.nn.functional.grouped_mm(rows, matrices, offs=ends)
    result = rows.new_empty(rows.shape[0], matrices.shape[2], dtype=rows.dtype)
    for e, some in enumerate(_slices(ends)):
        if some.stop > some.start:
            result[some] = rows[some] @ matrices[e].to(rows.dtype)
    return result


def outer(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Sum the outer products of two rows over the rows of each expert.

    Args:
        left: [N, M]; right: [N, K], the same dtype.
        ends: [E] int32.

    Returns:
        [E, M, K] of that dtype; zeros for an expert without rows.
    """
    if left.dtype == torch.bfloat16 and has_kernel(left.device):
        result = torch.nn.functional.grouped_mm(left.T, right, offs=ends)
        return _zero_empty(result, ends)
    result = left.new_zeros(ends.shape[0], left.shape[1], right.shape[1], dtype=left.dtype)
    for e, some in enumerate(_slices(ends)):
        if some.stop > some.start:
            torch.mm(left[some].T, right[some], out=result[e])
    return result


def _zero_empty(result: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Zero the products of experts without rows, for which torch's kernel promises nothing.

    torch's own test of such groups (`test_matmul_cuda.py`) leaves this product out. The kernel touches
    empty groups alone; a mask would read and write all.
    """
    if runs_triton(result) and result.is_contiguous():
        # Triton, for GPUs alone
        from ..kernels.moe.training.empty_groups import zero_empty_groups

        zero_empty_groups(result, ends)
        return result
    empty = ends == torch.cat([ends.new_zeros(1, dtype=ends.dtype), ends[:-1]])
    return result.masked_fill_(empty[:, None, None], 0)


def _slices(ends: torch.Tensor) -> list[slice]:
    last = ends.tolist()  # on a GPU this waits
    return [slice(start, stop) for start, stop in zip([0, *last], last, strict=False)]
