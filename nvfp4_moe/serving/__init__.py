"""NVFP4 experts in a serving stack: the switch, the servers' scalars, and what each server calls."""

# SPDX-License-Identifier: Apache-2.0
from .activation_policy import SERVERS, activation_of
from .fused import fused_experts_fp4
from .load import load
from .scales import ServingScales, serving_scales

__all__ = [
    "SERVERS",
    "ServingScales",
    "activation_of",
    "fused_experts_fp4",
    "load",
    "serving_scales",
]
