"""Cuts a fused call to a smaller one: fewer tokens, slots, experts, rows and columns.

What is kept has its codes, scales and scalars to the bit. The prepared tensors are taken back into
their natural rows and linear scales, cut in whole tiles, and laid out again; copies in CuTe-DSL's and
cutlass' layouts are made anew.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from .. import host
from ..cases.moe_case import MoECase
from ..reference.layouts import from_linear, inverse, to_linear
from ..reference.moe.activations import Activations
from ..reference.moe.routing import Routing, RoutingMethodType
from ..reference.recipe import BLOCK_SIZE, SfLayout
from ..reference.weights.copies import in_layouts_of, without_layouts
from ..reference.weights.experts import Experts
from ..reference.weights.layout import row_order

TILE = 128
"""Columns of H that are kept or dropped together, and of I without a gate; of I with one, half."""

PER_EXPERT = (
    "gemm1_weights", "gemm1_weights_scale", "gemm2_weights", "gemm2_weights_scale",
    "output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar",
    "gemm1_bias", "gemm2_bias", "gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit",
)  # fmt: skip
"""Fields of `Experts` whose first dimension is the expert."""

_128X4 = SfLayout.layout_128x4


def rebuilt(experts: Experts, **changes: Any) -> Experts:
    """Changed experts; those that had other layouts too get them anew.

    Raises:
        ValueError: the changed ones cannot have such a layout.
    """
    return in_layouts_of(without_layouts(experts, **changes), experts)


def with_given_routing(case: MoECase) -> MoECase:
    """The call with the ids and weights that its logits lead to."""
    ids, weights = case.routed
    routing = Routing(RoutingMethodType.Renormalize, ids.shape[1])
    return replace(
        case,
        routing=routing,
        logits=None,
        routing_bias=None,
        ids=ids.contiguous(),
        weights=weights.contiguous(),
    )


def keep_tokens(case: MoECase, tokens: Sequence[int]) -> MoECase:
    index = list(tokens)
    a = case.activations

    def rows(t: torch.Tensor | None) -> torch.Tensor | None:
        return None if t is None else t[index].contiguous()

    scales = a.block_scales
    if scales is not None:
        scales = scales.reshape(a.hidden_states.shape[0], -1)[index].contiguous()
    kept = Activations(a.hidden_states[index].contiguous(), scales, rows(a.per_token_scale))
    return replace(
        case,
        activations=kept,
        logits=rows(case.logits),
        ids=rows(case.ids),
        weights=rows(case.weights),
    )


def keep_slots(case: MoECase, slots: Sequence[int]) -> MoECase:
    """Some of the K slots of every token, of a call whose routing is given."""
    assert case.ids is not None and case.weights is not None
    index = list(slots)
    return replace(
        case,
        routing=replace(case.routing, top_k=len(index)),
        ids=case.ids[:, index].contiguous(),
        weights=case.weights[:, index].contiguous(),
    )


def keep_experts(case: MoECase, local: Sequence[int], offset: int | None = None) -> MoECase:
    """Keep some of the local experts of a call whose routing is given; ids are numbered anew.

    Args:
        local: experts, from 0 on; no id may name another of the local experts.
        offset: the new `local_expert_offset`; None: as many as there are lower ids in use.
    """
    assert case.ids is not None
    first, index = case.local_expert_offset, list(local)
    used = set(case.ids.unique().tolist())
    lower = sorted(i for i in used if i < first)
    higher = sorted(i for i in used if i >= first + case.experts.num_local)
    if offset is None:
        offset, low = len(lower), {old: new for new, old in enumerate(lower)}
    else:
        low = {old: old for old in lower}
    end = offset + len(index)
    numbers = low | {first + old: offset + new for new, old in enumerate(index)}
    numbers |= {old: end + new for new, old in enumerate(higher)}
    if used - set(numbers):
        raise ValueError(f"local is {index}; ids name others: {sorted(used - set(numbers))}")
    ids = case.ids.clone()
    for old, new in numbers.items():
        ids[case.ids == old] = new
    e = case.experts
    fields = {name: getattr(e, name) for name in PER_EXPERT}
    kept = {name: t[index].contiguous() for name, t in fields.items() if t is not None}
    return replace(
        case,
        ids=ids,
        experts=rebuilt(e, **kept),
        num_experts=end + len(higher),
        local_expert_offset=offset,
    )


def hidden_tiles(case: MoECase) -> int:
    return case.experts.padded_hidden_size // TILE


def keep_hidden(case: MoECase, tiles: Sequence[int]) -> MoECase:
    """Some tiles of H: of the hidden states, the first GEMM's columns and the second's rows."""
    e, a, index = case.experts, case.activations, list(tiles)
    width = TILE if a.is_bf16 else TILE // 2
    scales = a.block_scales
    if scales is not None:
        scales = _keep(scales.reshape(a.hidden_states.shape[0], -1), 1, TILE // BLOCK_SIZE, index)
    kept = Activations(_keep(a.hidden_states, 1, width, index), scales, a.per_token_scale)
    columns = _keep_columns(e.gemm1_weights, e.gemm1_weights_scale, TILE, index)
    rows = _keep_rows(e.gemm2_weights, e.gemm2_weights_scale, TILE, index, False)
    experts = rebuilt(
        e,
        gemm1_weights=columns[0],
        gemm1_weights_scale=columns[1],
        gemm2_weights=rows[0],
        gemm2_weights_scale=rows[1],
        gemm2_bias=_keep_bias(e.gemm2_bias, TILE, index, False),
        hidden_size=_valid(e.hidden_size, TILE, index),
    )
    return replace(case, activations=kept, experts=experts)


def intermediate_tiles(case: MoECase) -> int:
    return case.experts.padded_intermediate_size // _intermediate_tile(case.experts)


def keep_intermediate(case: MoECase, tiles: Sequence[int]) -> MoECase:
    """Some tiles of I: of the first GEMM's rows, of up and gate alike, and the second's columns."""
    e, index = case.experts, list(tiles)
    tile, gated = _intermediate_tile(e), e.activation.gated
    rows = _keep_rows(e.gemm1_weights, e.gemm1_weights_scale, tile, index, gated)
    columns = _keep_columns(e.gemm2_weights, e.gemm2_weights_scale, tile, index)
    experts = rebuilt(
        e,
        gemm1_weights=rows[0],
        gemm1_weights_scale=rows[1],
        gemm2_weights=columns[0],
        gemm2_weights_scale=columns[1],
        gemm1_bias=_keep_bias(e.gemm1_bias, tile, index, gated),
        intermediate_size=_valid(e.intermediate_size, tile, index),
    )
    return replace(case, experts=experts)


def _intermediate_tile(e: Experts) -> int:
    return TILE // 2 if e.activation.gated else TILE


def _valid(size: int, tile: int, index: list[int]) -> int:
    """Count the columns of the kept tiles that are no padding."""
    valid = sum(min(tile, max(0, size - tile * i)) for i in index)
    if not valid:
        raise ValueError(f"tiles {index} are padding alone")
    return valid


def _keep(t: torch.Tensor, dim: int, tile: int, index: list[int]) -> torch.Tensor:
    tiles = t.split(tile, dim)
    return torch.cat([tiles[i] for i in index], dim)


def _linear(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    rows, half = codes.shape[1:]
    return to_linear(scales.view(torch.uint8), rows, half * 2 // BLOCK_SIZE, _128X4)


def _swizzled(scales: torch.Tensor) -> torch.Tensor:
    return from_linear(scales, _128X4).view(torch.float8_e4m3fn)


def _keep_columns(
    codes: torch.Tensor, scales: torch.Tensor, tile: int, index: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    linear = _keep(_linear(codes, scales), 2, tile // BLOCK_SIZE, index)
    return _keep(codes, 2, tile // 2, index), _swizzled(linear)


def _kept_rows(rows: int, tile: int, index: list[int], gated: bool) -> torch.Tensor:
    """Places in the prepared order of the rows that stay, in the order they then have."""
    natural = host.arange(rows).chunk(2 if gated else 1)
    kept = torch.cat([_keep(half, 0, tile, index) for half in natural])
    order = row_order(kept.numel(), gated)
    return inverse(row_order(rows, gated))[kept[order]]


def _keep_rows(
    codes: torch.Tensor, scales: torch.Tensor, tile: int, index: list[int], gated: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = _kept_rows(codes.shape[1], tile, index, gated).to(codes.device)
    return codes[:, rows].contiguous(), _swizzled(_linear(codes, scales)[:, rows])


def _keep_bias(
    bias: torch.Tensor | None, tile: int, index: list[int], gated: bool
) -> torch.Tensor | None:
    if bias is None:
        return None
    return bias[:, _kept_rows(bias.shape[1], tile, index, gated).to(bias.device)].contiguous()
