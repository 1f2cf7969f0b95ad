"""Router weights that multiply the rows before the experts, in place of the results: Llama 4.

With one expert a token the row itself can be scaled, before it is quantized; the result then weighs 1.
The product is rounded as the models round it, weight and row in the row's dtype (transformers 5.24.0,
`models/llama4/modeling_llama4.py`). FlashInfer's FP4 launcher has no such option: its Llama4 routing
weighs the result.
"""

# SPDX-License-Identifier: Apache-2.0
import torch

from ...reference.moe.routing import Routing, route


def weigh_rows(
    x: torch.Tensor,
    routing: tuple[torch.Tensor, Routing] | tuple[torch.Tensor, torch.Tensor],
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Return x times its tokens' weights, and (ids, ones) as the routing.

    Args:
        x: [T, H] bf16 or fp16.
        routing: (logits [T, E], a `Routing`) or (ids int32 [T, 1], weights [T, 1]); bias: of the first.

    Raises:
        ValueError: more than one expert a token.
    """
    first, second = routing
    top_k = second.top_k if isinstance(second, Routing) else first.shape[1]
    if top_k != 1:
        raise ValueError(
            f"top_k is {top_k}; the router's weights multiply the input of these experts, which needs "
            "one weight a row: top_k must be 1"
        )
    ids, weights = _routed(first, second, bias) if isinstance(second, Routing) else (first, second)
    return x * weights.to(x.dtype), (ids, torch.ones_like(weights))


def _routed(
    logits: torch.Tensor, routing: Routing, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (ids, weights), by the kernel if there is a GPU."""
    if logits.is_cuda:
        from .routing import try_router

        if (router := try_router(logits, routing, bias)) is not None:
            return router.routed()
    result = route(logits, routing, bias)
    return result.ids, result.weights_bf16
