"""The canary that a server's environment asks for, and a layer's call that it watches."""

# SPDX-License-Identifier: Apache-2.0
from typing import TYPE_CHECKING, Any

import torch

from ..kernels import environment
from ..kernels.moe.api import fused_moe

if TYPE_CHECKING:
    from ..canary import Canary


def canary_asked_for() -> "Canary | None":
    """Return the process's canary; None, and nothing of it is imported, without NVFP4_MOE_CANARY.

    Raises:
        ValueError: a variable of the canary.
    """
    if environment.canary_steps() is None:
        return None
    from ..canary import from_environment

    return from_environment()


def watched_fused_moe(canary: "Canary | None", layer: str, **call: Any) -> torch.Tensor:
    """`fused_moe` of a server's layer, watched by the canary where there is one.

    Args:
        layer: the layer's name, for an alarm.
        call: arguments of `fused_moe`.

    Returns:
        [T, H] bf16.
    """
    if canary is None:
        return fused_moe(**call)
    return canary.fused_moe(layer=layer, **call)
