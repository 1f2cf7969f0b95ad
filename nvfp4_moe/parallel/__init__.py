"""The fused mixture of experts over several ranks of `torch.distributed`; docs/parallel.md."""

# SPDX-License-Identifier: Apache-2.0
from ..reference.moe.shards import select_experts, shard_experts
from .expert import fused_moe_ep
from .rank_check import AgreementError
from .tensor import fused_moe_tp

__all__ = ["AgreementError", "fused_moe_ep", "fused_moe_tp", "select_experts", "shard_experts"]
