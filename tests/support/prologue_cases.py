"""Cases of the launch that sorts few tokens and writes their rows."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import fields

import torch
from assertions import assert_bitwise

from nvfp4_moe.kernels.decode import decode_to_fragments
from nvfp4_moe.kernels.moe.hopper.prologue import sort_and_place
from nvfp4_moe.kernels.moe.hopper.rows import in_fragments
from nvfp4_moe.kernels.moe.permute import permute
from nvfp4_moe.kernels.quantize.launch import quantize_per_token, quantize_to_fragments
from nvfp4_moe.reference.moe.hidden_states import Activations
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


def equal(device, form, columns, tokens=3, top_k=4, experts=5, offset=2, tile=8) -> None:
    """Every tensor, where it is written, is that of `permute` and of the rows' own launch."""
    g = torch.Generator().manual_seed(columns)
    x = torch.randn(tokens, columns, generator=g).bfloat16()
    x[0, 3] = torch.nan
    x[tokens - 1, :16] = 0.0
    x = x.to(device)
    ids = ids_of(tokens, top_k, experts, offset).to(device)
    want = permute(ids, experts, offset, tile)
    recipe, activations = None, Activations(x)
    if isinstance(form, Recipe):
        recipe = form
        values, scale = quantize_to_fragments(x, recipe, per_token=True, place=want.permuted)
    elif form == "plain":
        values, scale = in_fragments(x, want.permuted), None
    else:
        codes, scales, token = quantize_per_token(x, 1 / 2688, Recipe())
        token = token if form == "codes" else None
        activations = Activations(codes, scales, token)
        values, scale = decode_to_fragments(codes, scales, token, place=want.permuted)
    p, got, got_scale = sort_and_place(activations, ids, experts, offset, tile, recipe)
    local = int(((ids >= offset) & (ids < offset + experts)).sum())
    used = int(want.tiles[2, 0])
    parts = {"expanded": local}
    for field in fields(want):
        ours, theirs = getattr(p, field.name), getattr(want, field.name)
        if field.name == "tiles":
            assert_bitwise(ours[0], theirs[0], "a tile's expert")
            assert_bitwise(ours[1, :used], theirs[1, :used], "a tile's first row")
            assert int(ours[2, 0]) == used
        else:
            end = parts.get(field.name)
            assert_bitwise(ours[:end], theirs[:end], field.name)
    assert_bitwise(got[:local], values[:local], "values")
    assert (got_scale is None) == (scale is None)
    if scale is not None:
        assert_bitwise(got_scale[:local], scale[:local], "scales")
