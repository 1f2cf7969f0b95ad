"""The fused mixture of experts in Triton: how its kernels follow one another.

Bits: codes, scales and the order of the finalize are those of `reference.moe`; the two sums are the
tensor cores'. Nothing waits for the GPU and nothing depends on values but values, so that a call can be
captured in a CUDA graph and replayed with another routing.
"""

# SPDX-License-Identifier: Apache-2.0
import math
from dataclasses import dataclass

import torch
import triton

from ...reference.activation import ActivationType
from ...reference.moe.activations import Activations
from ...reference.moe.finalize import FinalizeOrder, split_k_groups
from ...reference.recipe import Recipe, SfLayout
from ...reference.weights.experts import Experts
from ..decode import decode
from ..quantize.launch import quantize_global_scale, quantize_per_token, quantize_to_values
from ..triton_target import arch, launch_options, native_mma, shared_memory
from . import grouped_gemm as moe_gemm
from . import permute as moe_kernels
from .autotune import cache as config_cache
from .autotune.cache import Configs, GemmConfig
from .call import KernelCall, Mode, Observe
from .ops import Triple, empty_results, register

_DECODED_BYTES = 256 << 20
"""Decoded weights that exist at a time, at most (but one expert's at least)."""


def gemm_config(
    slots: int,
    num_experts: int,
    columns: int,
    *,
    batch_invariant: bool = False,
    native: bool = False,
    shared: int = 227,
) -> GemmConfig:
    """By the tokens an expert has on average, of `slots` that are held here, and the weights' columns.

    Tiles of decoded weights take 144 of `shared` KiB (`triton_target.shared_memory`).

    Both GEMMs of a call have the same `bn`, whatever their columns. The order in which a sum is taken
    depends on `bk` and `decoded` alone, which with `batch_invariant` are always the same. Measured on
    an H100 (`bench/moe_speed.py`); `native` is for GPUs that multiply codes, where nothing was.
    """
    each = -(-slots // num_experts)
    if native:
        if each <= 16:
            return GemmConfig(128, 16, 128, 4, 4)
        return GemmConfig(128, 64, 128, 3, 4) if each <= 64 else GemmConfig(128, 128, 128, 3, 8)
    if each <= 16:
        long = columns >= 4096 and not batch_invariant
        return GemmConfig(128, 16, 256, 3, 4) if long else GemmConfig(64, 16, 128, 4, 4)
    if each < 1024 or batch_invariant or shared < 144:
        return GemmConfig(128, 64, 128, 3, 8, registers=128)
    return GemmConfig(256, 128, 64, 4, 8, decoded=True)  # lost at 512


def held_slots(slots: int, experts: Experts, num_experts: int | None) -> int:
    """How many of T * K slots are held here when all `num_experts` have as many."""
    return -(-slots * experts.num_local // (num_experts or experts.num_local))


def table_configs(experts: Experts, slots: int, *, batch_invariant: bool = False) -> Configs:
    """`gemm_config` of both GEMMs."""
    here = arch(experts.gemm1_weights.device)
    first, second = (
        gemm_config(
            slots, experts.num_local, w.shape[2] * 2, batch_invariant=batch_invariant,
            native=native_mma(here), shared=shared_memory(here),
        )
        for w in (experts.gemm1_weights, experts.gemm2_weights)
    )  # fmt: skip
    return first, second


def _configs(
    experts: Experts, slots: int, top_k: int, mode: Mode, batch_invariant: bool
) -> Configs:
    """The tuned ones where there are any, else the table's.

    With `batch_invariant` the table's always: bits must not depend on what was measured where.
    """
    if not batch_invariant:
        tuned = config_cache.lookup(config_cache.key_of(experts, slots, top_k, mode))
        if tuned is not None:
            return tuned
    return table_configs(experts, slots, batch_invariant=batch_invariant)


_ONE_LAUNCH_SLOTS = 4096
"""Slots, at most, that each expert's program reads all of, twice."""


@dataclass(frozen=True)
class Permutation:
    """Slots sorted by expert, and the GEMM's tiles over them."""

    expanded: torch.Tensor  # [T * K] int32: expanded index of a permuted row
    permuted: torch.Tensor  # [T * K] int32: permuted row of an expanded index, -1: held elsewhere
    tiles: torch.Tensor  # [2, tiles] int32: expert, first permuted row
    end: torch.Tensor  # [E] int32


def permute(ids: torch.Tensor, num_local: int, local_expert_offset: int, tile: int) -> Permutation:
    """Sort the slots of [T, K] int32 global expert ids by expert, ascending in an expert."""
    slots = ids.numel()
    tiles = min(slots, num_local) + slots // tile

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=ids.device)

    p = Permutation(empty(slots), empty(slots), empty(2, tiles), empty(num_local))
    ids = ids.contiguous()
    bins = max(16, triton.next_power_of_2(num_local + 1))
    options = {"ARCH": arch(ids.device), **launch_options(ids.device)}
    if slots <= _ONE_LAUNCH_SLOTS:
        chunk = max(16, triton.next_power_of_2(slots))
        moe_kernels.permute_kernel[(num_local,)](
            ids, p.expanded, p.permuted, p.tiles, p.end,
            slots, tiles, local_expert_offset, num_local,
            BINS=bins, CHUNK=chunk, TILE=tile, num_warps=4 if chunk <= 2048 else 8, **options,
        )  # fmt: skip
        return p
    chunk = 128
    chunks = triton.cdiv(slots, chunk)
    total, counts = empty(bins).zero_(), empty(num_local, chunks)
    moe_kernels.count_kernel[(chunks,)](
        ids, total, counts, slots, local_expert_offset, num_local,
        BINS=bins, CHUNK=chunk, **options,
    )  # fmt: skip
    moe_kernels.offset_kernel[(num_local,)](
        total, counts, p.tiles, p.end, chunks, tiles, num_local,
        BINS=bins, STEP=1024, TILE=tile, **options,
    )  # fmt: skip
    moe_kernels.place_kernel[(chunks,)](
        ids, counts, p.expanded, p.permuted, slots, local_expert_offset, num_local,
        CHUNK=chunk, **options,
    )  # fmt: skip
    return p


def fused_moe(
    call: KernelCall,
    ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    config: GemmConfig | None = None,
    observe: Observe | None = None,
) -> Triple:
    """Launch the layer's kernels: an `moe_ops.Implementation`.

    Args:
        config: the tiles of both GEMMs; None: the tuned ones, or the table's.
    """
    results = empty_results(call, ids)
    tokens, top_k = ids.shape
    if tokens == 0:
        return results
    slots, experts, recipe = tokens * top_k, call.experts, call.recipe
    held, static, plain = experts.num_local, call.is_static, call.is_w4a16
    here = held_slots(slots, experts, call.all_experts)
    configs = (
        (config, config)
        if config
        else _configs(experts, here, top_k, call.mode, call.batch_invariant)
    )
    p = permute(ids, held, call.local_expert_offset, configs[0].bn)

    activations = call.activations
    x1 = quantized(activations.hidden_states, recipe) if call.quantize else operand(activations)
    intermediate = gemm1(x1, experts, p, slots, top_k, configs[0], fp32=static)
    if observe is not None:
        observe(ids, intermediate, p.permuted)
    if plain:
        x2 = operand(Activations(intermediate))
    else:
        x2 = quantized(intermediate, recipe, per_token=not static)
    rows = gemm2(x2, experts, p, slots, configs[1])
    output = results[0]
    if not call.do_finalize:
        return output, rows, p.permuted

    finalize(rows, p.permuted, weights, output, experts.padded_hidden_size, call.finalize_order)
    return results


def finalize(
    rows: torch.Tensor,
    permuted: torch.Tensor,
    weights: torch.Tensor,
    output: torch.Tensor,
    hidden_size: int,
    order: FinalizeOrder,
) -> None:
    """The reference's `finalize`, of rows [P, >= width] bf16 that `permuted` [T * K] names.

    Args:
        output: [T, width], bf16, fp16 or fp32.
        hidden_size: the padded one, which FlashInfer's order depends on.
    """
    (tokens, top_k), width = weights.shape, output.shape[1]
    groups = split_k_groups(tokens, top_k, hidden_size) if order == "flashinfer" else 1
    columns = min(1024, triton.next_power_of_2(width))
    moe_kernels.finalize_kernel[(tokens, triton.cdiv(width, columns))](
        rows, permuted, weights.contiguous(), output, rows.shape[1], width,
        K=top_k, GROUPS=groups, COLUMNS=columns, ARCH=arch(output.device), num_warps=4,
        **launch_options(output.device),
    )  # fmt: skip


OP = register("triton", fused_moe)
"""The same, which a compiler can call."""


@dataclass(frozen=True)
class Operand:
    """Rows of tokens as the GEMM reads them."""

    values: torch.Tensor  # [N, 4, K/4] bf16, each fourth column together; native: codes
    block_scales: torch.Tensor | None  # native: [N, K/16], linear
    token_scale: torch.Tensor | None  # [N] fp32


def operand(a: Activations) -> Operand:
    """Codes as they are where the GPU multiplies codes, decoded elsewhere."""
    if a.is_bf16:
        fours = a.hidden_states.unflatten(1, (-1, 4)).transpose(1, 2).contiguous()
        return Operand(fours, None, None)
    assert a.block_scales is not None
    scales = a.block_scales.view(torch.uint8)
    if native_mma(arch(a.hidden_states.device)):
        return Operand(a.hidden_states, scales, a.per_token_scale)
    return Operand(decode(a.hidden_states, scales, SfLayout.layout_linear), None, a.per_token_scale)


def quantized(x: torch.Tensor, recipe: Recipe, *, per_token: bool = True) -> Operand:
    """Rows [N, K], bf16 or fp32 with static scales, quantized: one launch where codes are decoded."""
    if not native_mma(arch(x.device)):
        values, token_scale = quantize_to_values(x, recipe, per_token=per_token)
        return Operand(values, None, token_scale)
    if per_token:
        return Operand(*quantize_per_token(x, recipe.base_scale_inv, recipe))
    return Operand(*quantize_global_scale(x, None, recipe), None)


def gemm1(
    x: Operand,
    experts: Experts,
    p: Permutation,
    slots: int,
    top_k: int,
    config: GemmConfig,
    *,
    fp32: bool,
) -> torch.Tensor:
    dtype = torch.float32 if fp32 else torch.bfloat16
    out = x.values.new_empty((slots, experts.padded_intermediate_size), dtype=dtype)
    _launch_gemm(
        x, experts.gemm1_weights, experts.gemm1_weights_scale, experts.gemm1_bias,
        experts.output1_scale_scalar, out, p, config, top_k, experts.activation, experts,
    )  # fmt: skip
    return out


def gemm2(
    x: Operand,
    experts: Experts,
    p: Permutation,
    slots: int,
    config: GemmConfig,
) -> torch.Tensor:
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
    config: GemmConfig,
    x_divisor: int,
    activation: ActivationType | None,
    experts: Experts,
) -> None:
    first = activation is not None
    held, rows, columns = w.shape[0], w.shape[1], w.shape[2] * 2
    bm = math.gcd(config.bm, rows)
    tiles = p.tiles.shape[1]
    at_once, weights = held, w
    if config.decoded:
        at_once = max(1, min(held, _DECODED_BYTES // (rows * columns * 2)))
        weights = w.new_empty((at_once, rows, 4, columns // 4), dtype=torch.bfloat16)
    for expert in range(0, held, at_once):
        if config.decoded:
            some = slice(expert, expert + at_once)
            decode(
                w[some].flatten(0, 1), w_sf[some], SfLayout.layout_128x4, operand=True,
                out=weights.flatten(0, 1),
            )  # fmt: skip
        moe_gemm.expert_gemm_kernel[(rows // bm, tiles)](
            x.values, x.block_scales, weights, w_sf.view(torch.uint8),
            x.token_scale, bias, scale,
            experts.output1_scale_gate_scalar if first else None,
            experts.gemm1_alpha if first else None,
            experts.gemm1_beta if first else None,
            experts.gemm1_clamp_limit if first else None,
            out, p.expanded, p.tiles, p.end, expert, at_once, tiles, rows, columns // 4,
            X_DIVISOR=x_divisor,
            ACT=int(activation) if activation is not None else moe_gemm.NONE.value,
            BM=bm, BN=config.bn, BK=config.bk, STAGES=config.stages,
            EVEN=columns % config.bk == 0, NATIVE=x.block_scales is not None,
            ARCH=arch(w.device), num_warps=config.warps,
            maxnreg=config.registers, **launch_options(w.device),
        )  # fmt: skip
