"""The compute capability behind a tensor: what requests are judged by, without importing Triton."""

# SPDX-License-Identifier: Apache-2.0
import torch


def capability_of(t: torch.Tensor) -> tuple[int, int] | None:
    """(9, 0) for a tensor on an H100; None for one that is on no GPU."""
    return of_device(t.device)


def of_device(device: torch.device) -> tuple[int, int] | None:
    """`capability_of` any tensor there. A rehearsal without the GPU replaces it."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None
