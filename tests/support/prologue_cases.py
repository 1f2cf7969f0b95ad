"""Cases of the launch that sorts few tokens and writes their rows, and routes them."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import fields

import torch
from assertions import assert_bitwise

from nvfp4_moe.kernels.decode import decode_to_fragments
from nvfp4_moe.kernels.moe.hopper.prologue import route_and_place, routes, sort_and_place
from nvfp4_moe.kernels.moe.hopper.rows import in_fragments
from nvfp4_moe.kernels.moe.permute import permute
from nvfp4_moe.kernels.moe.routing import router_of
from nvfp4_moe.kernels.quantize.launch import quantize_per_token, quantize_to_fragments
from nvfp4_moe.reference.moe.hidden_states import Activations
from nvfp4_moe.reference.moe.routing import METHODS, Routing, RoutingMethodType
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe

RECIPES = (Recipe(), Recipe("exact"), Recipe("exact", NVFP44Over6Config(256, "MSE")))
FORMS = (*RECIPES, "plain", "codes", "codes without token scales")
"""A recipe: rows are quantized per token."""
WIDTHS = (64, 128, 320, 2048, 2880, 4224)
"""Columns that fill no group of 128, or many; rows of one program, and of several."""


def ids_of(tokens: int, top_k: int, experts: int, offset: int) -> torch.Tensor:
    """Return ids of which some are not local, some no expert's, and some the same for many tokens."""
    g = torch.Generator().manual_seed(tokens * 100 + top_k)
    score = torch.rand(tokens, experts + 2 * offset, generator=g)
    score[:, offset] += 0.5
    ids = score.topk(top_k, dim=1).indices.int()
    ids[torch.rand(ids.shape, generator=g) < 0.1] = -1
    return ids


def equal(
    device, form, columns, tokens=3, top_k=4, experts=5, offset=2, tile=8, *, placed=True
) -> None:
    """Every tensor, where it is written, is that of `permute` and of the rows' own launch."""
    g = torch.Generator().manual_seed(columns)
    x = torch.randn(tokens, columns, generator=g).bfloat16()
    x[0, 3] = torch.nan
    x[tokens - 1, :16] = 0.0
    x = x.to(device)
    ids = ids_of(tokens, top_k, experts, offset).to(device)
    want = permute(ids, experts, offset, tile)
    place = want.permuted if placed else None
    recipe, activations = None, Activations(x)
    if isinstance(form, Recipe):
        recipe = form
        values, scale = quantize_to_fragments(x, recipe, per_token=True, place=place)
    elif form == "plain":
        values, scale = in_fragments(x, place), None
    else:
        codes, scales, token = quantize_per_token(x, 1 / 2688, Recipe())
        token = token if form == "codes" else None
        activations = Activations(codes, scales, token)
        values, scale = decode_to_fragments(codes, scales, token, place=place)
    got = sort_and_place(activations, ids, experts, offset, tile, recipe, placed=placed)
    _assert_placed(ids, experts, offset, (want, values, scale), got, placed)


def _assert_placed(ids, experts, offset, wanted, got, placed=True) -> None:
    (want, values, scale), (p, got_values, got_scale) = wanted, got
    local = int(((ids >= offset) & (ids < offset + experts)).sum())
    parts = {"expanded": local}
    for field in fields(want):
        ours, theirs = getattr(p, field.name), getattr(want, field.name)
        end = parts.get(field.name)
        assert_bitwise(ours[:end], theirs[:end], field.name)
    rows = local if placed else len(ids)
    assert_bitwise(got_values[:rows], values[:rows], "values")
    assert (got_scale is None) == (scale is None)
    if scale is not None:
        assert_bitwise(got_scale[:rows], scale[:rows], "scales")


ROUTINGS = (
    *(Routing(method, 8) for method in METHODS if method.raw and method.name != "Llama4"),
    Routing(RoutingMethodType.Llama4, 1),
    Routing(RoutingMethodType.Renormalize, 5),
    Routing(RoutingMethodType.TopK, 1),
    Routing(RoutingMethodType.Renormalize, 8, functions="hopper"),
    Routing(RoutingMethodType.TopKSigmoid, 3, functions="hopper"),
)
"""Every method that compares logits."""


def logits_of(tokens: int, experts: int, dtype: torch.dtype) -> torch.Tensor:
    """Return logits with ties, both zeros, infinities, and NaN of either sign."""
    g = torch.Generator().manual_seed(tokens * experts)
    logits = 3 * torch.randn(tokens, experts, generator=g)
    logits[0] = logits[0].round()
    logits[-1, 1], logits[-1, 4], logits[-1, 7] = torch.nan, torch.inf, -torch.inf
    if tokens > 1:
        logits[0, ::2], logits[0, 1::2] = 0.0, -0.0
    if tokens > 3:
        logits[1], logits[2, 3:] = torch.nan, -torch.inf
        logits[3] = -logits[-1]
    return logits.to(dtype)


def routed_equal(
    device, routing, tokens=3, experts=32, local=7, offset=3, dtype=torch.float32, form=RECIPES[0]
) -> None:
    """Every tensor, where it is written, is that of the launch that routes, then `sort_and_place`."""
    logits = logits_of(tokens, experts, dtype).to(device)
    assert routes(logits, routing)
    router = router_of(logits, routing)
    x = torch.randn(tokens, 320, generator=torch.Generator().manual_seed(tokens)).bfloat16()
    rest = local, offset, 8, form if isinstance(form, Recipe) else None
    activations = Activations(x.to(device))
    ids, weights = router.routed()
    wanted = sort_and_place(activations, ids, *rest)
    (got_ids, got_weights), got = route_and_place(activations, router, *rest)
    assert_bitwise(got_ids, ids, "ids")
    assert_bitwise(got_weights, weights, "weights")
    _assert_placed(ids, local, offset, wanted, got)
