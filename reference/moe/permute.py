"""The slots of local experts, and the order of their rows by expert.

A slot is a pair of a token and one of its K experts.
"""

# SPDX-License-Identifier: Apache-2.0
import torch


def local_slots(ids: torch.Tensor, num_local: int, local_expert_offset: int = 0) -> torch.Tensor:
    """Mark, [T, K] bool, the slots whose expert, a global id, is on this rank."""
    local = ids.long() - local_expert_offset
    return (local >= 0) & (local < num_local)


def permutation(ids: torch.Tensor, num_local: int, local_expert_offset: int = 0) -> torch.Tensor:
    """[T * K] int32: the permuted row of each expanded index token * K + slot, -1 where its
    expert is not on this rank.

    Rows are sorted by expert, ascending in it, without padding (FlashInfer pads experts to tiles).
    """
    local = ids.reshape(-1).long() - local_expert_offset
    is_local = local_slots(ids, num_local, local_expert_offset).reshape(-1)
    order = torch.where(is_local, local, num_local).argsort(stable=True)
    row = torch.empty_like(order)
    row[order] = torch.arange(order.numel(), dtype=torch.int64, device=order.device)
    return torch.where(is_local, row, -1).int()
