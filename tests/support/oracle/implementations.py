"""The two implementations compared with FlashInfer's kernels: our reference and our Triton kernels."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nvfp4_moe.kernels.quantize import ops as quantize
from nvfp4_moe.reference.moe import finalize as reference_finalize
from nvfp4_moe.reference.moe.finalize import FinalizeOrder
from nvfp4_moe.reference.moe.routing import Routing, route
from nvfp4_moe.reference.recipe import Recipe, SfLayout

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Implementation:
    """The functions of one backend, and where it wants its tensors."""

    device: str
    routing_refusal: Callable[[Routing], str | None]
    """Returns why there is no `route` for a routing; None if there is."""
    route: Callable[[torch.Tensor, Routing, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]
    finalize: Callable[..., torch.Tensor]
    """Takes rows [P, padded width], the row of each slot [T, K], weights [T, K], width and order."""
    quantize_per_token: Callable[..., Tensors]
    quantize_global_scale: Callable[..., Tensors]

    def per_token(
        self,
        x: torch.Tensor,
        recipe: Recipe,
        layout: SfLayout,
        row_index: torch.Tensor | None,
        out_scale: torch.Tensor | None,
    ) -> Tensors:
        return self.quantize_per_token(
            x, recipe.base_scale_inv, recipe, layout, row_index=row_index, out_scale=out_scale
        )

    def global_scale(
        self, x: torch.Tensor, scale: torch.Tensor, recipe: Recipe, layout: SfLayout, inverse: bool
    ) -> Tensors:
        return self.quantize_global_scale(x, scale, recipe, layout, inverse=inverse)


def _route(
    logits: torch.Tensor, routing: Routing, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    result = route(logits, routing, bias)
    return result.ids, result.weights_bf16


def _finalize(
    rows: torch.Tensor,
    place: torch.Tensor,
    weights: torch.Tensor,
    width: int,
    order: FinalizeOrder,
) -> torch.Tensor:
    by_slot = rows[:, :width].float()[place.clamp(min=0).long()]
    total = reference_finalize.finalize(by_slot, weights, order, place >= 0)
    return total.to(rows.dtype)


REFERENCE = Implementation(
    "cpu",
    lambda routing: None,
    _route,
    _finalize,
    quantize.reference_per_token,
    quantize.reference_global_scale,
)


def triton(device: str) -> Implementation:
    """On a GPU, or in the interpreter on the CPU."""
    from nvfp4_moe.kernels.moe import routing as ours
    from nvfp4_moe.kernels.moe.finalize import finalize
    from nvfp4_moe.kernels.quantize import launch

    def finalized(
        rows: torch.Tensor,
        place: torch.Tensor,
        weights: torch.Tensor,
        width: int,
        order: FinalizeOrder,
    ) -> torch.Tensor:
        output = rows.new_empty((place.shape[0], width))
        finalize(rows, place.int().flatten(), weights, output, order)
        return output

    return Implementation(
        device,
        lambda routing: ours.refusal(routing, torch.device(device)),
        ours.route,
        finalized,
        launch.quantize_per_token,
        launch.quantize_global_scale,
    )
