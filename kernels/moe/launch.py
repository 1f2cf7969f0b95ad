"""The fused mixture of experts in Triton, step by step.

Codes, scales and the order of the finalize are those of `reference/moe/`. The tensor cores choose the
order of the two sums. No step waits for the GPU, and no launch depends on values. So a call can be
captured in a CUDA graph and replayed with another routing.
"""

# SPDX-License-Identifier: Apache-2.0
import math
from dataclasses import dataclass, replace

import torch

from ...reference.activation import ActivationType
from ...reference.moe.hidden_states import Activations
from ...reference.recipe import Recipe, SfLayout
from ...reference.weights.experts import Experts
from .. import op_schema
from ..decode import decode, decode_to_fragments
from ..jit.fragments import padded_to_fragments
from ..launcher import launch
from ..op_schema import Flat
from ..quantize.launch import (
    quantize_global_scale,
    quantize_per_token,
    quantize_to_fragments,
    quantize_to_values,
)
from ..triton_target import arch, launch_options, native_mma
from .activation import NONE
from .autotune import cache
from .call import KernelCall, Mode, Observe, padded
from .finalize import finalize
from .grouped_gemm import expert_gemm_kernel
from .hopper import prologue
from .hopper.config import RingConfig, gathers
from .hopper.rows import in_fragments, is_padded_there
from .masked.rows import copy_rows
from .ops import EXPERTS, Triple, empty_results, register
from .permute import Permutation, permute
from .routing import Router
from .tile_table import Config, Configs, local_slots, table_configs

_DECODED_BYTES = 256 << 20
"""The most bytes of decoded weights that exist at a time; one expert's weights may be more."""
Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""The three results of an `Implementation`, and the weights [T, K]."""
_Routing = Router | tuple[torch.Tensor, torch.Tensor]
"""Logits and how they are routed, or ids and weights."""


def _configs(
    experts: Experts, slots: int, top_k: int, mode: Mode, batch_invariant: bool
) -> Configs:
    """Return the tuned tiles if there are any, and the table's if there are none.

    With `batch_invariant` it returns the table's, since bits must not depend on what was measured.
    """
    table = table_configs(experts, slots, batch_invariant=batch_invariant)
    if not batch_invariant:
        tuned = cache.lookup(cache.key_of(experts, slots, top_k, mode))
        if tuned is not None and type(tuned[0]) is type(table[0]):
            return tuned
    return table


def fused_moe(
    call: KernelCall,
    ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    config: Config | None = None,
    observe: Observe | None = None,
) -> Triple:
    """Launch the kernels of the layer, as an `Implementation` of `ops.py`.

    Args:
        config: the tiles of both GEMMs; None: the tuned tiles, or the table's.
    """
    output, rows, permuted, _ = _layer(call, (ids, weights), config, observe)
    return output, rows, permuted


@dataclass(frozen=True)
class LogitsCall:
    """A call whose experts are chosen from logits on its way; it crosses `torch.library`."""

    call: KernelCall
    router: Router


def fused_moe_of_logits(given: LogitsCall, *, observe: Observe | None = None) -> Routed:
    """Do what `fused_moe` does; the fourth result is the weights [T, K] bf16."""
    return _layer(given.call, given.router, None, observe)


def _shape_of(routing: _Routing) -> tuple[int, int]:
    """Return (T, K)."""
    if isinstance(routing, Router):
        return routing.shape
    tokens, top_k = routing[0].shape
    return tokens, top_k


def _layer(
    call: KernelCall,
    routing: _Routing,
    config: Config | None,
    observe: Observe | None,
) -> Routed:
    tokens, top_k = _shape_of(routing)
    results = empty_results(call, tokens, top_k)
    if tokens == 0:
        return *results, (routing.launched() if isinstance(routing, Router) else routing)[1]
    slots, experts, recipe = tokens * top_k, call.experts, call.recipe
    static, plain = call.is_static, call.is_w4a16
    local = local_slots(slots, experts, call.all_experts)
    configs = (
        (config, config)
        if config
        else _configs(experts, local, top_k, call.mode, call.batch_invariant)
    )
    ring = isinstance(configs[0], RingConfig)
    if not (ring and is_padded_there(call)):
        call = padded(call)
    (ids, weights), p, x1 = _sorted_rows(call, routing, configs[0])
    # The second GEMM's operand as the first writes it, where nobody else reads it.
    direct = ring and plain and observe is None
    intermediate = gemm1(x1, experts, p, slots, top_k, configs[0], fp32=static, fragments=direct)
    del x1  # its memory serves the steps that follow
    if observe is not None:
        observe(ids, intermediate, p.permuted)
    if direct:
        x2 = Operand(intermediate, None, None)
    elif plain:
        x2 = operand(Activations(intermediate), ring=ring)
    else:
        x2 = quantized(intermediate, recipe, per_token=not static, ring=ring)
    del intermediate
    rows = gemm2(x2, experts, p, slots, configs[1])
    output = results[0]
    if not call.do_finalize:
        return output, rows, p.permuted, weights

    finalize(rows, p.permuted, weights, output, call.finalize_order)
    return *results, weights


def _sorted_rows(
    call: KernelCall, routing: _Routing, config: Config
) -> tuple[tuple[torch.Tensor, torch.Tensor], Permutation, "Operand"]:
    """Sort the slots by expert; return ids and weights, too, and the first GEMM's operand.

    Few tokens take one launch, which also routes if it can.
    """
    a, local, offset = call.activations, call.experts.num_local, call.local_expert_offset
    (tokens, top_k), columns = _shape_of(routing), call.experts.padded_hidden_size
    ring, tile = isinstance(config, RingConfig), config.bn
    placed = _is_placed(config, tokens, columns)
    few = ring and prologue.serves(tokens, top_k, columns)
    recipe = call.recipe if call.quantize else None
    if isinstance(routing, Router):
        if few and prologue.routes(routing.logits, routing):
            routed, (p, values, scale) = prologue.route_and_place(
                a, routing, local, offset, tile, recipe, placed=placed
            )
            return routed, p, Operand(values, None, scale, placed)
        routing = routing.launched()
    if few:
        p, values, scale = prologue.sort_and_place(
            a, routing[0], local, offset, tile, recipe, placed=placed
        )
        return routing, p, Operand(values, None, scale, placed)
    p = permute(routing[0], local, offset, tile)
    place = p.permuted if placed else None
    if call.quantize:
        return routing, p, quantized(a.hidden_states, call.recipe, ring=ring, place=place)
    return routing, p, operand(a, ring=ring, place=place)


OP = register("triton", fused_moe)
"""`fused_moe` as an op of `torch.library`, which a compiler can call."""


def _empty_of_logits(given: LogitsCall) -> Routed:
    weights = given.router.logits.new_empty(given.router.shape, dtype=torch.bfloat16)
    return *empty_results(given.call, *given.router.shape), weights


OP_OF_LOGITS = op_schema.register(
    "triton_fused_moe_of_logits",
    Flat(LogitsCall, EXPERTS),
    fused_moe_of_logits,
    _empty_of_logits,
    "(Tensor, Tensor, Tensor, Tensor)",
)
"""`fused_moe_of_logits` as an op."""


@dataclass(frozen=True)
class Operand:
    """The rows of activations in the form that the grouped GEMM reads."""

    values: torch.Tensor
    """[N, 4, K/4] bf16, columns 0, 4, 8 ..., then 1, 5, 9 ...; native: codes; for a ring [rows, K] bf16,
    in the order of `jit/fragments.py`."""
    block_scales: torch.Tensor | None  # native: [N, K/16], linear
    token_scale: torch.Tensor | None  # [N] fp32
    placed: bool = False  # rows are by permuted row: for a ring, which otherwise gathers tokens


def places(p: Permutation, config: Config, rows: int, columns: int) -> torch.Tensor | None:
    """Return where the first GEMM wants [rows, columns] of tokens: `place` of `operand`."""
    return p.permuted if _is_placed(config, rows, columns) else None


def _is_placed(config: Config, rows: int, columns: int) -> bool:
    """Return True if a token's row is written once for each of its slots, at their permuted rows."""
    return isinstance(config, RingConfig) and not gathers(config, rows, columns)


def operand(
    a: Activations,
    row_index: torch.Tensor | None = None,
    *,
    ring: bool = False,
    place: torch.Tensor | None = None,
) -> Operand:
    """Return codes as they are if the GPU multiplies codes, and decoded if it does not.

    Args:
        row_index: [N] int32, a row itself, or -1 for a row that is not read; None: all are.
        ring: for the GEMM of `hopper/`.
        place: with `ring`, the permuted row of each slot; None: a row stays where it is.
    """
    if ring:
        if a.is_bf16:
            values = in_fragments(a.hidden_states, place, row_index)
            return Operand(values, None, None, place is not None)
        assert a.block_scales is not None
        values, token = decode_to_fragments(
            a.hidden_states, a.block_scales, a.per_token_scale, row_index=row_index, place=place
        )
        return Operand(values, None, token, place is not None)
    if a.is_bf16:
        if row_index is not None:
            return Operand(copy_rows(a.hidden_states, row_index, fourths=True), None, None)
        fours = a.hidden_states.unflatten(1, (-1, 4)).transpose(1, 2).contiguous()
        return Operand(fours, None, None)
    assert a.block_scales is not None
    scales = a.block_scales.view(torch.uint8)
    if native_mma(arch(a.hidden_states.device)):
        return Operand(a.hidden_states, scales, a.per_token_scale)
    values = decode(a.hidden_states, scales, SfLayout.layout_linear, row_index=row_index)
    return Operand(values, None, a.per_token_scale)


def quantized(
    x: torch.Tensor,
    recipe: Recipe,
    *,
    per_token: bool = True,
    row_index: torch.Tensor | None = None,
    ring: bool = False,
    place: torch.Tensor | None = None,
) -> Operand:
    """Quantize rows [N, K], bf16, or fp32 with static scales.

    One launch quantizes and decodes if the GPU does not multiply codes.

    Args:
        row_index, ring, place: as for `operand`.
    """
    if ring:
        values, token = quantize_to_fragments(
            x, recipe, per_token=per_token, row_index=row_index, place=place
        )
        return Operand(values, None, token, place is not None)
    if not native_mma(arch(x.device)):
        values, token = quantize_to_values(x, recipe, per_token=per_token, row_index=row_index)
        return Operand(values, None, token)
    if per_token:
        base = recipe.base_scale_inv
        return Operand(*quantize_per_token(x, base, recipe, row_index=row_index))
    return Operand(*quantize_global_scale(x, 1.0, recipe, row_index=row_index), None)


def gemm1(
    x: Operand,
    experts: Experts,
    p: Permutation,
    slots: int,
    top_k: int,
    config: Config,
    *,
    fp32: bool,
    fragments: bool = False,
) -> torch.Tensor:
    """Return [slots, padded intermediate size], activated: bf16, or fp32 for static scales.

    Args:
        fragments: columns in the order in which the GEMM of `hopper/` reads them, with zeros up to a
            multiple of 128.
    """
    dtype = torch.float32 if fp32 else torch.bfloat16
    columns = experts.padded_intermediate_size
    if fragments:
        columns = padded_to_fragments(columns)
    out = x.values.new_empty((slots, columns), dtype=dtype)
    _launch_gemm(
        x, experts.gemm1_weights, experts.gemm1_weights_scale, experts.gemm1_bias,
        experts.output1_scale_scalar, out, p, config, top_k, experts.activation, experts,
        fragments=fragments,
    )  # fmt: skip
    return out


def first_sums(
    x: Operand,
    experts: Experts,
    p: Permutation,
    slots: int,
    top_k: int,
    config: Config,
) -> torch.Tensor:
    """Return the first GEMM's sums [slots, rows of weights] fp32, before scales, bias and activation.

    A column is a row of the weights as `row_order(rows, gated=False)` places it.
    """
    w = experts.gemm1_weights
    out = x.values.new_empty((slots, w.shape[1]), dtype=torch.float32)
    _launch_gemm(
        replace(x, token_scale=None), w, experts.gemm1_weights_scale, None,
        torch.ones_like(experts.output1_scale_scalar), out, p, config, top_k, None, experts,
    )  # fmt: skip
    return out


def gemm2(
    x: Operand,
    experts: Experts,
    p: Permutation,
    slots: int,
    config: Config,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return [slots, padded hidden size] bf16, by permuted row."""
    if out is None:
        out = x.values.new_empty((slots, experts.padded_hidden_size), dtype=torch.bfloat16)
    _launch_gemm(
        x, experts.gemm2_weights, experts.gemm2_weights_scale, experts.gemm2_bias,
        experts.output2_scale_scalar, out, p, config, 0, None, experts,
    )  # fmt: skip
    return out


def _launch_gemm(
    x: Operand,
    w: torch.Tensor,
    w_sf: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    out: torch.Tensor,
    p: Permutation,
    config: Config,
    x_divisor: int,
    activation: ActivationType | None,
    experts: Experts,
    *,
    fragments: bool = False,
) -> None:
    first = activation is not None
    if isinstance(config, RingConfig):
        from .hopper.launch import expert_gemm  # Gluon, which other GPUs do not need

        expert_gemm(
            x.values, x.token_scale, w, w_sf, bias, scale, out, p, config,
            experts if first else None, top_k=0 if x.placed else x_divisor, fragments=fragments,
        )  # fmt: skip
        return
    local, rows, columns = w.shape[0], w.shape[1], w.shape[2] * 2
    bm = math.gcd(config.bm, rows)
    at_once, weights = local, w
    if config.decoded:
        at_once = max(1, min(local, _DECODED_BYTES // (rows * columns * 2)))
        weights = w.new_empty((at_once, rows, 4, columns // 4), dtype=torch.bfloat16)
    for expert in range(0, local, at_once):
        if config.decoded:
            some = slice(expert, expert + at_once)
            decode(
                w[some].flatten(0, 1),
                w_sf[some],
                SfLayout.layout_128x4,
                operand=True,
                out=weights.flatten(0, 1),
            )
        launch(expert_gemm_kernel, (rows // bm, p.tiles.shape[0]),
            x.values, x.block_scales, weights, w_sf.view(torch.uint8),
            x.token_scale, bias, scale,
            experts.output1_scale_gate_scalar if first else None,
            experts.gemm1_alpha if first else None,
            experts.gemm1_beta if first else None,
            experts.gemm1_clamp_limit if first else None,
            out, p.expanded, p.tiles, expert, at_once, rows, columns // 4,
            X_DIVISOR=x_divisor,
            ACT=int(activation) if activation is not None else NONE.value,
            BM=bm, BN=config.bn, BK=config.bk, STAGES=config.stages,
            EVEN=columns % config.bk == 0, NATIVE=x.block_scales is not None,
            ARCH=arch(w.device), num_warps=config.warps,
            maxnreg=config.registers, **launch_options(w.device),
        )  # fmt: skip
