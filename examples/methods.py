"""The kinds of NVFP4 that the examples compare, for feed-forward layers divided into experts."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from feed_forward import Layer, Ranges

from nvfp4_moe import (
    ActivationType,
    NVFP44Over6Config,
    Recipe,
    fused_moe,
    prepare_experts,
)

UNCALIBRATED = 6.0 * 448  # the maximum at which an encode scale is 1


@dataclass(frozen=True)
class Method:
    """A way to prepare and call the experts."""

    calibrated: str | None = None  # on which texts; None: no static scales
    factor: float = 1.0  # on the calibrated maxima
    prepare: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)


METHODS = {
    "NVFP4 weights, bf16 activations": Method(call={"activation": "bf16"}),
    "static scales of one (never calibrated)": Method("nothing", call={"activation": "static"}),
    "static scales, maxima 4 times too small": Method(
        "others", 0.25, call={"activation": "static"}
    ),
    "static scales, other texts": Method("others", call={"activation": "static"}),
    "static scales, these texts": Method("these", call={"activation": "static"}),
    "per-token scales": Method(),
    "per-token, 4over6": Method(call={"nvfp4_4over6": NVFP44Over6Config()}),
    "per-token, 4over6, weights too": Method(
        prepare={"recipe": Recipe("exact", NVFP44Over6Config())},
        call={"nvfp4_4over6": NVFP44Over6Config()},
    ),
}


def nvfp4_layer(
    method: Method,
    parts: Mapping[str, torch.Tensor],
    activation: ActivationType,
    layer: int,
    ranges: Mapping[str, Ranges],
) -> Layer:
    """Make a layer in which every token takes every expert, with weight 1.

    Args:
        parts: the experts' weights and biases, as `prepare_experts` takes them.
        layer: its number in the ranges.
        ranges: by the texts, "these" and "others"; those that the method is calibrated on.
    """
    amax: dict[str, float] = {}
    if method.calibrated == "nothing":
        amax = dict.fromkeys(("input_amax", "intermediate_amax"), UNCALIBRATED)
    elif method.calibrated:
        found = ranges[method.calibrated].amax(layer)
        amax = {name: value * method.factor for name, value in found.items()}
    arguments: dict[str, Any] = {**parts, **amax, **method.prepare}
    experts = prepare_experts(activation=activation, **arguments)

    def run(x: torch.Tensor) -> torch.Tensor:
        ids = torch.arange(experts.num_local, device=x.device, dtype=torch.int32)
        ids = ids.repeat(x.shape[0], 1)
        weights = torch.ones_like(ids, dtype=torch.bfloat16)
        return fused_moe(x, experts, (ids, weights), **method.call)

    return run
