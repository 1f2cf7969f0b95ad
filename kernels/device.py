"""The compute capability of a tensor's GPU, which rules of backends read, without importing Triton."""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch

from ..reference import checks


def capability_of(t: torch.Tensor) -> tuple[int, int] | None:
    """Return (9, 0) for a tensor on an H100, and None for one that is on no GPU."""
    return of_device(t.device)


def of_device(device: torch.device) -> tuple[int, int] | None:
    """Return `capability_of` any tensor on the device. A rehearsal without the GPU replaces this."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def check_capability(given: Any) -> None:
    """Raise TypeError or ValueError for what is neither None nor a compute capability, as (10, 0)."""
    if given is None:
        return
    allowed = "None, or a compute capability, as (10, 0)"
    checks.pair("capability", given, allowed)
    if not all(isinstance(part, int) and part >= 0 for part in given):
        checks.wrong_value("capability", given, allowed)
