"""Intervals that hold the output of every implementation that keeps the contract.

`moe.py` states the argument and bounds the fused mixture of experts, `dense.py` the dense product,
`parallel.py` layers that are split over ranks. The other files bound one step each.
"""

# SPDX-License-Identifier: Apache-2.0
from .moe import MoEBounds, fused_moe_bounds, routed_moe_bounds

__all__ = ["MoEBounds", "fused_moe_bounds", "routed_moe_bounds"]
