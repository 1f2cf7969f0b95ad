"""Experts of a checkpoint, with the activations that the switch asks for."""

# SPDX-License-Identifier: Apache-2.0
from pathlib import Path
from typing import Any

from ..checkpoints.errors import CheckpointError
from ..checkpoints.folder import Folder
from ..checkpoints.formats import read_quantization
from ..checkpoints.load import load_experts
from ..kernels import environment
from ..kernels.moe.backends import MoEBackend
from ..reference import checks
from ..reference.weights.experts import Experts
from .activation_policy import activation_of


def load(
    folder: Path | str | Folder,
    layer: int | str,
    *,
    backend: MoEBackend | str = "auto",
    per_token: bool | None = None,
    **options: Any,
) -> Experts:
    """`checkpoints.load_experts` by the switch; `fused_moe(x, experts, routing)` then follows.

    On: activations have a scale for each token, and the checkpoint's input scales are not used. Off:
    static scales, the largest over all experts.

    Args:
        folder, layer: as for `load_experts`.
        backend: that will run them, of `fused_moe`.
        per_token: the switch; omitted, the environment's.
        options: further arguments of `load_experts`, but `static`.

    Raises:
        UnsupportedError: the backend does not serve what the switch asks for.
        CheckpointError: as `load_experts`; and, with static scales, that the checkpoint has none: every
            one is exactly 1, which stands for per-token serving. `load_experts(static=True)` takes it.
    """
    if per_token is not None:
        checks.flag("per_token", per_token)
    if not isinstance(folder, Folder):
        checks.path("folder", folder)
    source = folder if isinstance(folder, Folder) else Folder(folder)
    quantization = read_quantization(source).format.name
    static = activation_of("nvfp4-moe", backend, quantization, per_token=per_token) == "static"
    experts = load_experts(source, layer, static=static, **options)
    if static and experts.input_scale == 1 and experts.intermediate_scale == 1:
        raise CheckpointError(
            source.path,
            [
                f"layer {layer}: its input scales are 1, neutral, as of a checkpoint that was never "
                f"calibrated; set {environment.SWITCH_VARIABLES[0]}=1 for per-token activations"
            ],
        )
    return experts
