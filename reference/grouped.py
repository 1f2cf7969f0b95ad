"""The earlier path of `moe/grouped.py`, which the documentation of version 0.1 names."""

# SPDX-License-Identifier: Apache-2.0
from .moe.grouped import fused_moe_grouped, quantize_grouped

__all__ = ["fused_moe_grouped", "quantize_grouped"]
