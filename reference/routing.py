"""The earlier path of `moe/routing.py`, which the documentation of version 0.1 names."""

# SPDX-License-Identifier: Apache-2.0
from .moe.routing import (
    Routing,
    RoutingMethodType,
    RoutingResult,
    append_shared_experts,
    pack_topk,
    refusal,
    route,
    unpack_topk,
)

__all__ = [
    "Routing",
    "RoutingMethodType",
    "RoutingResult",
    "append_shared_experts",
    "pack_topk",
    "refusal",
    "route",
    "unpack_topk",
]
