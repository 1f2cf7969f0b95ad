"""The samplers' experts: their arithmetic by name, and how they are made and loaded."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass
from typing import Any, Literal

import torch

from nvfp4_moe import Experts, NVFP44Over6Config, Recipe, fused_moe, prepare_experts


@dataclass(frozen=True)
class Arithmetic:
    """The arguments of `prepare_experts` and `fused_moe`."""

    activation: Literal["per-token", "static", "bf16"] = "per-token"
    four_over_six: bool = False
    batch_invariant: bool = True

    @property
    def config(self) -> NVFP44Over6Config | None:
        return NVFP44Over6Config() if self.four_over_six else None

    def options(self, amax: tuple[float, float] | None) -> dict[str, Any]:
        """The arguments that `prepare_experts` and `load_` take beside the weights."""
        found: dict[str, Any] = {}
        if self.four_over_six:
            found["recipe"] = Recipe("exact", self.config)
        if self.activation == "static":
            assert amax is not None, "static activations were not calibrated"
            found |= {"input_amax": amax[0], "intermediate_amax": amax[1]}
        return found

    def prepare(
        self, w13: torch.Tensor, w2: torch.Tensor, amax: tuple[float, float] | None
    ) -> Experts:
        return prepare_experts(w13, w2, **self.options(amax))

    def run(self, x: torch.Tensor, experts: Experts, ids: Any, weights: Any) -> torch.Tensor:
        return fused_moe(
            x.contiguous(),
            experts,
            (ids.to(torch.int32).contiguous(), weights.contiguous()),
            activation=self.activation,
            nvfp4_4over6=self.config,
            batch_invariant=self.batch_invariant,
        )


ARITHMETIC = {
    "static": Arithmetic("static"),
    "per token": Arithmetic(),
    "4over6 per token": Arithmetic(four_over_six=True),
    "W4A16": Arithmetic("bf16"),
}
"""The samplers of the tables, by the names there; "bf16" is a stack's own layer."""
