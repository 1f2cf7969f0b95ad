"""A layer over several ranks: each rank's experts, and what the sum of tensor-parallel shards is.

A shard has some of the intermediate's columns: rows of the first GEMM, columns of the second. Weights
are quantized before they are cut, so that every shard has the expert's scalars, and cut between blocks
of 16. Then, with n shards,

    row_r[t, k]   what `layer.fused_moe` computes of shard r: its intermediate is quantized by its *own*
                  row maximum, its rows are rounded to bf16; gemm2_bias is shard 0's alone
    output_r[t]   row_r finalized by shard r, rounded to the dtype that travels
    output[t]     output_0 + output_1 + ... in that dtype, rounded to the output's

so n shards are another function than one: other row maxima give other block scales and codes.

Sources: sizes, `align_fp4_moe_weights_for_flashinfer_trtllm` of sglang 0.5.
"""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass, fields
from typing import Any

import torch

from .. import checks
from ..layouts import inverse, to_linear
from ..numerics.accumulate import Accumulate
from ..numerics.subnormals import kept
from ..recipe import BLOCK_SIZE, Recipe, SfLayout
from ..weights.copies import without_layouts
from ..weights.experts import Experts
from ..weights.layout import lay_out, lay_out_rows, padded_sizes, row_order, unshuffled_bias
from .activations import Activations
from .finalize import FinalizeOrder
from .layer import MoEResult, fused_moe

_ALIKE = (
    "output1_scale_scalar",
    "output1_scale_gate_scalar",
    "output2_scale_scalar",
    "gemm1_alpha",
    "gemm1_beta",
    "gemm1_clamp_limit",
    "input_scale",
    "intermediate_scale",
)
"""Fields that every shard has as the whole layer does; copies, since a reload writes them."""
_OF_THE_LAYER = ("input_scale", "intermediate_scale")
"""Tensors that are not one an expert."""


def shard_columns(intermediate_size: int, rank: int, shards: int) -> slice:
    """The intermediate's columns that shard `rank` of `shards` holds: whole blocks, spread evenly.

    Raises:
        ValueError: there is no such shard, or a shard would have no block.
    """
    blocks = intermediate_size // BLOCK_SIZE
    if intermediate_size % BLOCK_SIZE or not 1 <= shards <= blocks:
        raise ValueError(
            f"shards is {shards}; an intermediate of {intermediate_size} has {blocks} whole blocks of "
            f"{BLOCK_SIZE}, and each shard takes one at least"
        )
    if not 0 <= rank < shards:
        raise ValueError(f"rank is {rank}; of {shards} shards it must be 0 to {shards - 1}")
    start, stop = (r * blocks // shards * BLOCK_SIZE for r in (rank, rank + 1))
    return slice(start, stop)


def shard_size(intermediate_size: int, shards: int, gated: bool) -> int:
    """The intermediate size of every shard, zeros included: a multiple of 16, of 128 without a gate."""
    largest = -(-intermediate_size // (BLOCK_SIZE * shards)) * BLOCK_SIZE
    return largest if gated else -(-largest // 128) * 128


def shard_experts(experts: Experts, rank: int, shards: int) -> Experts:
    """Shard `rank` of prepared experts, prepared: the same codes, block scales and scalars.

    Layouts of other backends (`with_cute_dsl`, `with_cutlass`) are the shard's to make again.

    Raises:
        ValueError: as `shard_columns`; the experts are a shard already.
    """
    checks.instance("experts", experts, Experts, "Experts, as prepare_experts makes them")
    checks.integer("rank", rank)
    checks.integer("shards", shards)
    e, gated = experts, experts.activation.gated
    if e.shard != (0, 1):
        raise ValueError(
            f"experts are shard {e.shard[0]} of {e.shard[1]}; they must be the whole layer's"
        )
    columns = shard_columns(e.intermediate_size, rank, shards)
    size, width = shard_size(e.intermediate_size, shards, gated), columns.stop - columns.start
    m1, padded = e.gemm1_weights.shape[1], e.padded_hidden_size
    order1 = inverse(row_order(m1, gated, e.gemm1_weights.device))
    order2 = inverse(row_order(padded, False, e.gemm1_weights.device))[: e.hidden_size]

    def rows1(t: torch.Tensor) -> torch.Tensor:
        """[E, halves * size, C] of natural rows [E, M1, C]."""
        halves = [half[:, columns] for half in t.chunk(2 if gated else 1, 1)]
        return torch.cat([_extended(half, 1, size) for half in halves], 1)

    def columns2(t: torch.Tensor, per: int) -> torch.Tensor:
        """[E, H, size / per] of natural rows [E, H, I / per]."""
        part = t[:, order2, columns.start // per : columns.stop // per]
        return _extended(part, 2, size // per)

    def linear(scales: torch.Tensor, rows: int, k: int) -> torch.Tensor:
        return to_linear(scales.view(torch.uint8), rows, k // BLOCK_SIZE, SfLayout.layout_128x4)

    assert 0 < width <= size
    hidden, (wide, rows) = e.hidden_size, padded_sizes(e.hidden_size, size, gated)
    codes1 = e.gemm1_weights[:, order1, : hidden // 2]
    scales1 = linear(e.gemm1_weights_scale, m1, padded)[:, order1, : hidden // BLOCK_SIZE]
    scales2 = linear(e.gemm2_weights_scale, padded, e.padded_intermediate_size)
    w13 = lay_out(rows1(codes1), rows1(scales1), gated, rows, wide)
    w2 = lay_out(columns2(e.gemm2_weights, 2), columns2(scales2, BLOCK_SIZE), False, wide, rows)
    bias1 = bias2 = None
    if e.gemm1_bias is not None:
        natural = rows1(unshuffled_bias(e.gemm1_bias, gated)[..., None])
        bias1 = lay_out_rows(natural, gated, rows)[..., 0]
    if e.gemm2_bias is not None and rank == 0:
        bias2 = e.gemm2_bias.clone()
    # Scalars, and biases divided by them, are taken over: made again they might round otherwise.
    alike: dict[str, Any] = {
        name: None if (t := getattr(e, name)) is None else t.clone() for name in _ALIKE
    }
    return without_layouts(
        e,
        gemm1_weights=w13[0],
        gemm1_weights_scale=w13[1],
        gemm2_weights=w2[0],
        gemm2_weights_scale=w2[1],
        intermediate_size=size,
        gemm1_bias=bias1,
        gemm2_bias=bias2,
        shard=(rank, shards),
        **alike,
    )


def select_experts(experts: Experts, first: int, count: int) -> Experts:
    """`count` experts from `first` on: what a rank holds whose `local_expert_offset` is `first`.

    They are copies: the whole layer need not stay in memory, and a reload writes the part alone. Layouts
    of other backends are the rank's to make again.

    Raises:
        ValueError: the experts do not hold that many.
    """
    checks.instance("experts", experts, Experts, "Experts, as prepare_experts makes them")
    checks.integer("first", first)
    checks.integer("count", count)
    if not 0 <= first < first + count <= experts.num_local:
        raise ValueError(
            f"first is {first} and count {count}; there are {experts.num_local} experts, and a rank "
            "holds one at least"
        )
    some = slice(first, first + count)
    selected: dict[str, Any] = {
        f.name: (value if f.name in _OF_THE_LAYER else value[some]).clone()
        for f in fields(experts)
        if isinstance(value := getattr(experts, f.name), torch.Tensor)
    }
    start = (experts.first_expert or 0) + first
    return without_layouts(experts, **selected, first_expert=start)


@dataclass(frozen=True)
class ShardedResult:
    output: torch.Tensor  # [T, H] of the dtype asked for
    shards: tuple[MoEResult, ...]  # each rank's, whose outputs travel


@kept
def fused_moe_shards(
    activations: Activations,
    experts: Experts,
    ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    tp_shards: int,
    recipe: Recipe | None = None,
    local_expert_offset: int = 0,
    accumulate: Accumulate = "fp64",
    finalize_order: FinalizeOrder = "flashinfer",
    reduce_dtype: torch.dtype | None = None,
    output_dtype: torch.dtype = torch.bfloat16,
    keep_steps: bool = False,
) -> ShardedResult:
    """`layer.fused_moe` over `tp_shards` tensor-parallel ranks, summed in rank order; see the module.

    Args:
        experts: of the whole layer.
        reduce_dtype: in which the shards' outputs travel and are added; None: output_dtype.
        The rest: as for `layer.fused_moe`.
    """
    travels = reduce_dtype or output_dtype
    results = tuple(
        fused_moe(
            activations,
            shard_experts(experts, rank, tp_shards),
            ids,
            weights,
            recipe=recipe,
            local_expert_offset=local_expert_offset,
            accumulate=accumulate,
            finalize_order=finalize_order,
            output_dtype=travels,
            keep_steps=keep_steps,
        )
        for rank in range(tp_shards)
    )
    total = results[0].output
    for result in results[1:]:
        total = total + result.output
    return ShardedResult(total.to(output_dtype), results)


def _extended(t: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """Zeros behind, up to `size`."""
    shape = list(t.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([t, t.new_zeros(shape)], dim)
