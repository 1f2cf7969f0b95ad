"""The experts of a layer: NVFP4 weights as FlashInfer's TRT-LLM kernels want them, and back.

    value of a weight = e2m1 code * e4m3 block scale * the expert's fp32 decode scale

The first GEMM's rows are [up; gate], interleaved row by row and shuffled; block scales are shuffled
alike and lie in 128x4. Source: flashinfer-python 0.7.2, `fused_moe/prepare.py:468-672` and
`fused_moe/core.py:475-560`; scalars: its `trtllm_fused_moe_runner.cu:670-805`.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .. import checks
from ..activation import ActivationType
from ..layouts import from_linear, to_linear
from ..numerics import e2m1, e4m3
from ..numerics.subnormals import kept
from ..quantize import quantize_global_scale
from ..recipe import BLOCK_SIZE, Recipe, SfLayout
from ..shuffle import interleave_gated_rows, inverse, shuffle_rows
from . import shown
from .arguments import Options, check_assembly, check_option_values, check_preparation, check_values
from .parameters import Parameters
from .scalars import (
    MOST_RAW,
    check_one_scale,
    in_raw_units,
    product,
    quotient,
    raised,
    weight_encode_scale,
)

if TYPE_CHECKING:
    from .cute_dsl import CuteDslWeights
    from .cutlass import CutlassWeights

_128X4 = SfLayout.layout_128x4


@dataclass(frozen=True)
class Experts:
    """The weights of `num_local` experts, and what else the fused call needs to know of them.

    H and I below are the padded sizes, multiples of 128 (I of 64, gated); padding is zero.
    `hidden_size` and `intermediate_size` are the valid ones. M1 is 2 I for gated activations, else I.
    The unit of every scalar and parameter, with its source: `docs/units.md`.
    """

    gemm1_weights: torch.Tensor  # [E, M1, H/2] uint8, rows shuffled
    gemm1_weights_scale: torch.Tensor  # [E, M1, H/16] float8_e4m3fn, rows shuffled, 128x4
    gemm2_weights: torch.Tensor  # [E, H, I/2] uint8
    gemm2_weights_scale: torch.Tensor  # [E, H, I/16] float8_e4m3fn
    output1_scale_scalar: torch.Tensor  # [E] fp32, of the up half (gated), of the result otherwise
    output1_scale_gate_scalar: torch.Tensor  # [E] fp32, of the gate half, or of the argument
    output2_scale_scalar: torch.Tensor  # [E] fp32
    hidden_size: int
    intermediate_size: int
    activation: ActivationType = ActivationType.Swiglu
    gemm1_bias: torch.Tensor | None = None  # [E, M1] fp32, rows shuffled, divided by the scalar
    gemm2_bias: torch.Tensor | None = None  # [E, H] fp32, likewise
    gemm1_alpha: torch.Tensor | None = None  # [E] fp32
    gemm1_beta: torch.Tensor | None = None  # [E] fp32; SwiGLU's: divided by up's scalar
    gemm1_clamp_limit: torch.Tensor | None = None  # [E] fp32, divided by the gate scalar
    input_scale: torch.Tensor | None = None  # [1] fp32 encode scale of static activations
    intermediate_scale: torch.Tensor | None = None  # [1] fp32, the same of the intermediate
    cute_dsl: "CuteDslWeights | None" = None  # by `reference.weights.cute_dsl.with_cute_dsl`
    cutlass: "CutlassWeights | None" = None  # by `reference.weights.cutlass.with_cutlass`
    shard: tuple[int, int] = (0, 1)  # which of how many shards of the intermediate
    first_expert: int | None = None  # place in the layer, where it is known
    router_weight_on_input: bool = False  # weights multiply the rows, not the results: Llama 4

    def __repr__(self) -> str:
        return shown.experts(self)

    @property
    def num_local(self) -> int:
        return self.gemm1_weights.shape[0]

    @property
    def padded_hidden_size(self) -> int:
        return self.gemm2_weights.shape[1]

    @property
    def padded_intermediate_size(self) -> int:
        return self.gemm2_weights.shape[2] * 2

    def load_(
        self,
        w13: torch.Tensor,
        w2: torch.Tensor,
        *,
        first: int = 0,
        amax: tuple[torch.Tensor, torch.Tensor] | None = None,
        recipe: Recipe | None = None,
        w13_bias: torch.Tensor | None = None,
        w2_bias: torch.Tensor | None = None,
        alpha: torch.Tensor | float | None = None,
        beta: torch.Tensor | float | None = None,
        clamp_limit: torch.Tensor | float | None = None,
        input_amax: float | None = None,
        intermediate_amax: float | None = None,
        backend: str = "auto",
    ) -> None:
        """Quantize new weights into these experts, in place; `update.py` has the contract.

        On a GPU it is five launches and three for each padded GEMM, reads the weights twice, needs a few
        bytes of memory, and does not wait: it can be captured itself. Afterwards every byte is what
        `prepare_experts` makes of the same arguments. No gradient reaches the weights, and nothing of
        them is kept.

        Args:
            w13: [n, 2 I, H] bf16 or fp16, [up; gate], [n, I, H] without a gate: of experts
                `first` to `first + n - 1`, on the device of these; w2: [n, H, I], the same dtype.
            amax: [n] fp32 each, largest magnitudes of w13 and of w2, where they are known: the
                weights are then read once. Larger values than these saturate.
            recipe: of the weights; exact math by default, as in `prepare_experts`.
            w13_bias, w2_bias, alpha, beta, clamp_limit: as for `prepare_experts`, of the same n
                experts: needed where these experts have them, refused elsewhere.
            input_amax, intermediate_amax: likewise; of a part of the experts, those of the layer.
            backend: "auto", "triton" or "reference"; they write the same bits.

        Raises:
            TypeError, ValueError: an argument that does not fit, on a CPU also by its values; a missing
                option; a backend that cannot serve. Nothing has been written then.
        """
        from .update import load_  # which needs this class

        options = Options(
            w13_bias, w2_bias, alpha, beta, clamp_limit, input_amax, intermediate_amax
        )
        load_(
            self, w13, w2, first=first, amax=amax, recipe=recipe, options=options, backend=backend
        )

    def checksum(self) -> str:
        """64 hexadecimal digits over every bit of the layer, the same on every device.

        Of the weights, scales, scalars and sizes; not of copies for other kernels (`with_cute_dsl`).
        `checksum.py` has the formula. It waits for the GPU.
        """
        from .checksum import checksum

        return checksum(self)


def padded_sizes(hidden_size: int, intermediate_size: int, gated: bool) -> tuple[int, int]:
    """H and I of the prepared tensors: whole tiles of 128 rows in both GEMMs."""
    tile = 64 if gated else 128
    return -(-hidden_size // 128) * 128, -(-intermediate_size // tile) * tile


@torch.no_grad()
@kept
def prepare_experts(
    w13: torch.Tensor,
    w2: torch.Tensor,
    activation: ActivationType = ActivationType.Swiglu,
    *,
    recipe: Recipe | None = None,
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    alpha: torch.Tensor | float | None = None,
    beta: torch.Tensor | float | None = None,
    clamp_limit: torch.Tensor | float | None = None,
    input_amax: float | None = None,
    intermediate_amax: float | None = None,
) -> Experts:
    """Quantize ordinary weights, an expert at a time, and lay them out for every backend.

    Gate and up of an expert share one scale; an expert of zeros has scale 1. No scalar, bias or limit
    leaves fp32, whatever the weights' size: `scalars.py` says what the smallest are rounded to.

    Args:
        w13: [E, 2 I, H] bf16 or fp16, rows [up; gate] of gated activations, [E, I, H] of the others;
            up = w13[:, :I]. H and I are multiples of 16.
        w2: [E, H, I] of the same dtype.
        recipe: of the weights; exact math by default, since this happens once.
        w13_bias: [E, 2 I] or [E, I], and w2_bias [E, H], any float dtype, in physical units.
        alpha, beta, clamp_limit: of the activation, one value or one an expert, physical units.
        input_amax, intermediate_amax: largest magnitudes of the layer's input and intermediate, for
            static activation scales; without them activations have a scale for each token.

    Raises:
        ValueError, TypeError: an argument, or two that do not fit together; a NaN or an infinity in
            weights or biases, for which preparation waits for the GPU.
    """
    options = Options(w13_bias, w2_bias, alpha, beta, clamp_limit, input_amax, intermediate_amax)
    check_preparation(w13, w2, activation, recipe, options)
    if checks.reads_values(w13, w2, waits=True):
        check_values(w13, w2, activation, options)
    return quantize_experts(w13, w2, activation, recipe, options)


def quantize_experts(
    w13: torch.Tensor,
    w2: torch.Tensor,
    activation: ActivationType,
    recipe: Recipe | None,
    options: Options,
) -> Experts:
    """`prepare_experts` of arguments that are checked; it does not wait for the GPU."""
    recipe = recipe or Recipe("exact")
    parameters = Parameters.of(w13, activation, options)
    quantized = []
    for w, most in zip((w13, w2), parameters.most_encode_scales, strict=True):
        each = most.expand(len(w)) if isinstance(most, torch.Tensor) else [most] * len(w)
        experts = (quantize_weight(w[e], w[e].abs().amax(), recipe, each[e]) for e in range(len(w)))
        quantized.append([torch.stack(part) for part in zip(*experts, strict=True)])
    return _assembled(quantized[0], quantized[1], parameters)


@kept
def quantize_weight(
    w: torch.Tensor,
    amax: torch.Tensor,
    recipe: Recipe,
    most: torch.Tensor | float = MOST_RAW,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize rows of an expert's weights, as `prepare_experts` does.

    Args:
        w: [rows, K] bf16 or fp16.
        amax: [], the largest magnitude of all rows that share the scale (gate's and up's).
        most: the largest encode scale; `scalars.most_encode_scale` of what is added to the sums.

    Returns:
        (codes, linear block scales, decode scale []); zeros have scale 1.
    """
    encode = weight_encode_scale(amax, recipe, most)
    q = quantize_global_scale(w, encode, recipe)
    return q.codes, q.block_scales, encode.reciprocal()


@torch.no_grad()
@kept
def assemble_experts(
    w13_codes: torch.Tensor,
    w13_scales: torch.Tensor,
    w13_decode: torch.Tensor,
    w2_codes: torch.Tensor,
    w2_scales: torch.Tensor,
    w2_decode: torch.Tensor,
    activation: ActivationType = ActivationType.Swiglu,
    *,
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    alpha: torch.Tensor | float | None = None,
    beta: torch.Tensor | float | None = None,
    clamp_limit: torch.Tensor | float | None = None,
    input_amax: float | None = None,
    intermediate_amax: float | None = None,
) -> Experts:
    """Lay already quantized weights out for every backend.

    Args:
        w13_codes: [E, 2 I, H/2] uint8, rows [up; gate], not shuffled; w2_codes [E, H, I/2].
        w13_scales: [E, 2 I, H/16] e4m3 (uint8 or float8_e4m3fn), linear; w2_scales [E, H, I/16].
        w13_decode: [E] fp32, or [E, 2] for (up, gate) apart; w2_decode [E].
        The rest: as for `prepare_experts`.

    Raises:
        ValueError, TypeError: an argument, or two that do not fit together; a NaN or an infinity in
            biases or decode scales, for which it waits for the GPU.
        ValueError: scales apart for up and gate that the contract cannot express: with a clamp limit,
            SwigluStep or SiTU.
    """
    options = Options(w13_bias, w2_bias, alpha, beta, clamp_limit, input_amax, intermediate_amax)
    quantized = (w13_codes, w13_scales, w13_decode), (w2_codes, w2_scales, w2_decode)
    check_assembly(*quantized, activation, options)
    if checks.reads_values(w13_codes, waits=True):
        for name, decode in (("w13_decode", w13_decode), ("w2_decode", w2_decode)):
            checks.values(name, decode, (decode >= 0) & decode.isfinite(), "finite, 0 or above")
        check_option_values(activation, options)
    return assemble_checked(*quantized, activation, options)


def assemble_checked(
    w13: Sequence[torch.Tensor],
    w2: Sequence[torch.Tensor],
    activation: ActivationType,
    options: Options,
) -> Experts:
    """`assemble_experts` of (codes, block scales, decode scales), checked; values of any kind do."""
    w13_codes, w13_scales, w13_decode = w13
    w2_codes, w2_scales, w2_decode = w2
    parameters = Parameters.of(w13_codes, activation, options)
    w13_decode, w2_decode = (t.detach().float() for t in (w13_decode, w2_decode))
    if w13_decode.dim() == 2:
        up, gate = w13_decode.unbind(1)
        check_one_scale(activation, up, gate, parameters.clamp_limit)
    first, second = parameters.most_encode_scales
    return _assembled(
        (w13_codes, *raised(w13_scales, w13_decode, first)),
        (w2_codes, *raised(w2_scales, w2_decode, second)),
        parameters,
    )


def _assembled(w13: Sequence[torch.Tensor], w2: Sequence[torch.Tensor], p: Parameters) -> Experts:
    """Experts of (codes, block scales, decode scales), as `assemble_experts` takes them."""
    gated, linear_up = p.activation.gated, p.activation.linear_up
    rows, half = w13[0].shape[1:]
    hidden, intermediate = half * 2, rows // (2 if gated else 1)
    padded = padded_sizes(hidden, intermediate, gated)
    up, gate = w13[2].unbind(1) if w13[2].dim() == 2 else (w13[2], w13[2])
    up, gate = quotient(up, p.input_scale), quotient(gate, p.input_scale)
    output2 = quotient(w2[2], p.intermediate_scale)
    bias1 = bias2 = None
    beta = p.beta if p.added_beta is None else in_raw_units(p.added_beta, up)
    limit = None if p.clamp_limit is None else in_raw_units(p.clamp_limit, gate)
    if p.w13_bias is not None:
        halves = [up, gate] if linear_up else [gate]
        divisor = torch.stack(halves, 1).repeat_interleave(rows // len(halves), 1)
        bias1 = lay_out_bias(p.w13_bias, divisor, gated, padded[1])
    if p.w2_bias is not None:
        bias2 = lay_out_bias(p.w2_bias, output2[:, None], False, padded[0])
    return Experts(
        *lay_out(w13[0], w13[1], gated, padded[1], padded[0]),
        *lay_out(w2[0], w2[1], False, padded[0], padded[1]),
        product(up if linear_up else torch.ones_like(gate), p.intermediate_scale).contiguous(),
        gate.contiguous(), output2.contiguous(), hidden, intermediate, p.activation, bias1, bias2,
        p.alpha, beta, limit, p.input_scale, p.intermediate_scale,
    )  # fmt: skip


def lay_out(
    codes: torch.Tensor, scales: torch.Tensor, gated: bool, rows: int, columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, block scales) of natural rows, as the prepared tensors hold them.

    Args:
        codes: [E, rows, K/2] uint8, of `gated` [up; gate]; scales: [E, rows, K/16], linear.
        rows: padded ones, of each half; columns: padded ones, not packed.
    """
    return (
        _pad_columns(lay_out_rows(codes, gated, rows), columns // 2),
        _swizzle(_pad_columns(lay_out_rows(_bytes(scales), gated, rows), columns // BLOCK_SIZE)),
    )


def lay_out_bias(bias: torch.Tensor, divisor: torch.Tensor, gated: bool, rows: int) -> torch.Tensor:
    """[E, padded rows] fp32 of a bias [E, rows] in physical units: divided by the scalar after it."""
    return lay_out_rows(in_raw_units(bias, divisor)[..., None], gated, rows)[..., 0]


def gemm1_values(experts: Experts, expert: int) -> torch.Tensor:
    """[M1, H] fp32 of one expert: code times block scale (exact), rows [up; gate]."""
    codes, scales = experts.gemm1_weights[expert], experts.gemm1_weights_scale[expert]
    return _values(codes, scales)[
        inverse(row_order(codes.shape[0], experts.activation.gated, codes.device))
    ]


def gemm2_values(experts: Experts, expert: int) -> torch.Tensor:
    """[H, I] fp32 of one expert: code times block scale (exact)."""
    codes, scales = experts.gemm2_weights[expert], experts.gemm2_weights_scale[expert]
    return _values(codes, scales)[inverse(row_order(codes.shape[0], False, codes.device))]


def unshuffled_bias(bias: torch.Tensor, gated: bool) -> torch.Tensor:
    """[..., rows] of a prepared bias, back in the order [up; gate]."""
    return bias[..., inverse(row_order(bias.shape[-1], gated, bias.device))]


def reordered(
    codes: torch.Tensor, scales: torch.Tensor, order: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, block scales in 128x4) of the same rows in another order; [E, rows, ...] both."""
    rows, half = codes.shape[1:]
    linear = to_linear(_bytes(scales), rows, half * 2 // BLOCK_SIZE, _128X4)
    return codes[:, order].contiguous(), _swizzle(linear[:, order])


def row_order(rows: int, gated: bool, device: torch.device | str = "cpu") -> torch.Tensor:
    """Indices that bring natural rows into the order of the prepared tensors."""
    order = shuffle_rows(rows, device=device)
    return interleave_gated_rows(rows, device)[order] if gated else order


def _bytes(scales: torch.Tensor) -> torch.Tensor:
    return scales.view(torch.uint8)


def _pad_rows(t: torch.Tensor, rows: int) -> torch.Tensor:
    full = t.new_zeros((t.shape[0], rows, *t.shape[2:]))
    full[:, : t.shape[1]] = t
    return full


def _pad_columns(t: torch.Tensor, columns: int) -> torch.Tensor:
    full = t.new_zeros((*t.shape[:2], columns))
    full[..., : t.shape[2]] = t
    return full


def lay_out_rows(t: torch.Tensor, gated: bool, rows: int) -> torch.Tensor:
    """[E, natural rows, C]: each half padded to `rows`, interleaved and shuffled."""
    halves = t.chunk(2, 1) if gated else (t,)
    full = torch.cat([_pad_rows(half, rows) for half in halves], 1)
    return full[:, row_order(full.shape[1], gated, t.device)].contiguous()


def _swizzle(scales: torch.Tensor) -> torch.Tensor:
    return from_linear(scales, _128X4).view(torch.float8_e4m3fn)


def _values(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    rows, half = codes.shape
    linear = to_linear(_bytes(scales), rows, half * 2 // BLOCK_SIZE, _128X4)
    values = e2m1.decode(e2m1.unpack(codes)).unflatten(-1, (-1, BLOCK_SIZE))
    return (values * e4m3.decode(linear)[..., None]).flatten(-2)
