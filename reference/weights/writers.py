"""The writers of new weights into experts, by backend.

`update.py` asks a writer of this table for what `Experts.load_` writes. The package adds the one of the
Triton kernels. Nothing here imports torch, so that the package can add it before torch is loaded.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .update import Writer

    Find = Callable[[torch.device], tuple[Writer | None, str]]


def _find_reference(device: "torch.device") -> "tuple[Writer | None, str]":
    from .update import write_by_reference

    return write_by_reference, ""


WRITERS: "dict[str, Find]" = {"reference": _find_reference}
"""By backend: what finds the writer for a device, or None and the reason why there is none."""
