"""The writers of new weights into experts that stand beside the reference's own, by backend.

`Experts.load_` finds its writer here. The package adds the one of the Triton kernels.
Nothing here imports torch, so that the package can add it before torch is loaded.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from .update import Writer

    Find = Callable[[torch.device], tuple[Writer | None, str]]

WriterName = Literal["auto", "reference", "triton"]
"""The values of `backend` in `Experts.load_`."""
WRITERS: "dict[str, Find]" = {}
"""By backend: what finds the writer for a device, or None and the reason why there is none."""
