"""`Experts.load_` on a GPU: makes the Triton kernels the writer that `backend="auto"` takes there."""

# SPDX-License-Identifier: Apache-2.0
import torch

from ..reference.weights.update import WRITERS, Writer
from . import backends
from .capability import of_device


def _find(device: torch.device) -> tuple[Writer | None, str]:
    probe = torch.empty(0, dtype=torch.uint8, device=device)
    if (reason := backends.triton_refusal_of(probe, "weights are", of_device(device))) is not None:
        return None, reason
    from .reload_launch import write

    return write, ""


WRITERS["triton"] = _find
