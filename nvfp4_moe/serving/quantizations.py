"""The names by which a server's option `--quantization` asks for this library, and what they mean."""

# SPDX-License-Identifier: Apache-2.0
import torch

from ..kernels.backends import UnsupportedError
from ..kernels.moe.call import Mode

QUANTIZATIONS: dict[str, Mode] = {
    "nvfp4_moe": "per-token",
    "nvfp4_moe_static": "static",
    "nvfp4_moe_w4a16": "bf16",
}
"""The activations of each name. Static ones are the checkpoint's own scales."""

LOWEST_CAPABILITY = 80
"""The lowest that Triton's kernels run on, as `README.md` says; servers ask for it on a GPU alone."""


def refuse_static_of_bf16(activation: Mode) -> None:
    """Raise UnsupportedError where static scales are asked for, and the checkpoint is in bf16."""
    if activation == "static":
        raise UnsupportedError(
            "the checkpoint is in bf16 and has no static activation scales; take nvfp4_moe or "
            "nvfp4_moe_w4a16"
        )


class Requirements:
    """The type and the GPU that a server's configuration asks for with this library's experts."""

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return LOWEST_CAPABILITY


class Named(Requirements):
    """A server's configuration under one of the names; the class has the server's own base beside it."""

    name: str

    @classmethod
    def activation(cls) -> Mode:
        """Return the activations that the name asks for."""
        return QUANTIZATIONS[cls.name]

    def get_name(self) -> str:
        return self.name
