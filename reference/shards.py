"""The earlier path of `moe/shards.py`, which the documentation of version 0.1 names."""

# SPDX-License-Identifier: Apache-2.0
from .moe.shards import (
    ShardedResult,
    fused_moe_shards,
    select_experts,
    shard_columns,
    shard_experts,
    shard_size,
)

__all__ = [
    "ShardedResult",
    "fused_moe_shards",
    "select_experts",
    "shard_columns",
    "shard_experts",
    "shard_size",
]
