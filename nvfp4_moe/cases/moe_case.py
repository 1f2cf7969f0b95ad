"""One call of the fused mixture of experts, and what is allowed of its output."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch

from ..kernels.moe.call import MoECall, make_moe_call
from ..reference.bounds.accumulation import ANY_ORDER, Accumulation
from ..reference.bounds.interval import Interval
from ..reference.bounds.moe import fused_moe_bounds, routed_moe_bounds
from ..reference.moe import layer as moe
from ..reference.moe.activations import Activations
from ..reference.moe.finalize import FinalizeOrder
from ..reference.moe.routing import Routing, route
from ..reference.recipe import LayerBuild, Recipe
from ..reference.weights.experts import Experts


@dataclass(frozen=True)
class MoECase:
    """One fused call: from router logits, or with ids [T, K] and weights [T, K] given."""

    name: str
    activations: Activations
    experts: Experts  # in the layouts of the build, too
    routing: Routing
    num_experts: int
    logits: torch.Tensor | None = None  # [T, E]
    routing_bias: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    local_expert_offset: int = 0
    recipe: Recipe = field(default_factory=Recipe)  # of the intermediate
    build: LayerBuild = "cuda"
    finalize_order: FinalizeOrder = "flashinfer"
    output_dtype: torch.dtype = torch.bfloat16
    exact: bool = False
    """Every sum is exact, so that there is one right output, to the bit."""

    @property
    def routed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids, weights)."""
        if self.logits is None:
            assert self.ids is not None and self.weights is not None
            return self.ids, self.weights
        chosen = route(self.logits, self.routing, self.routing_bias)
        return chosen.ids, chosen.weights_bf16

    def request(self) -> MoECall:
        return make_moe_call(
            self.activations,
            self.experts,
            num_experts=self.num_experts,
            routing=self.routing,
            local_expert_offset=self.local_expert_offset,
            logits=self.logits,
            routing_bias=self.routing_bias,
            topk=None if self.logits is not None else (self.ids, self.weights),
            finalize_order=self.finalize_order,
            output_dtype=self.output_dtype,
            nvfp4_4over6=self.recipe.four_over_six,
            fast_math=self.recipe.math == "fast",
            build=self.build,
        )

    def reference(self) -> torch.Tensor:
        """The reference's output, [T, H] of `output_dtype`."""
        return self.run().output

    def run(self, *, keep_steps: bool = False) -> moe.MoEResult:
        """The reference's run."""
        return moe.fused_moe(
            self.activations,
            self.experts,
            *self.routed,
            recipe=self.recipe,
            local_expert_offset=self.local_expert_offset,
            finalize_order=self.finalize_order,
            variant=self.build,
            output_dtype=self.output_dtype,
            keep_steps=keep_steps,
        )

    def allowed(
        self, accumulation: Accumulation = ANY_ORDER, *, drops_nan: bool = False
    ) -> Interval:
        """The intervals of an output; with logits they cover every permitted choice of experts.

        Args:
            drops_nan: as `fused_moe_bounds` has it.
        """
        options: dict[str, Any] = {
            "recipe": self.recipe,
            "local_expert_offset": self.local_expert_offset,
            "finalize_order": self.finalize_order,
            "accumulation": accumulation,
            "variant": self.build,
            "output_dtype": self.output_dtype,
            "drops_nan": drops_nan,
        }
        if self.logits is not None:
            return routed_moe_bounds(
                self.activations,
                self.experts,
                self.logits,
                self.routing,
                self.routing_bias,
                **options,
            )
        return fused_moe_bounds(self.activations, self.experts, *self.routed, **options).output

    def to(self, device: torch.device | str) -> "MoECase":
        """Return the case on another device."""
        return to_device(self, device)


def to_device(thing: Any, device: torch.device | str) -> Any:
    """A tensor, or a dataclass of tensors and of such dataclasses, on a device."""
    if isinstance(thing, torch.Tensor):
        return thing.to(device)
    if is_dataclass(thing) and not isinstance(thing, type):
        values = {f.name: to_device(getattr(thing, f.name), device) for f in fields(thing)}
        return type(thing)(**values)
    return thing
