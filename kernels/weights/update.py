"""The Triton kernels as the writer that `Experts.load_` with `backend="auto"` takes on a GPU.

`nvfp4_moe/__init__.py` adds it to the table of writers.
"""

# SPDX-License-Identifier: Apache-2.0
import torch

from ...reference.weights.update import Writer
from .. import backends
from ..device import of_device


def find_writer(device: torch.device) -> tuple[Writer | None, str]:
    """The kernels' writer for a device, or None and the reason why they cannot run there."""
    probe = torch.empty(0, dtype=torch.uint8, device=device)
    if (reason := backends.triton_refusal_of(probe, "weights are", of_device(device))) is not None:
        return None, reason
    from .launch import write

    return write, ""
