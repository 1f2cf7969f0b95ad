"""The NVFP4 quantizers, in PyTorch, to the bit: the specification.

    value of an element = e2m1 code * e4m3 block scale * fp32 scale (one a row, or one a tensor)

With A = largest |x| of the row, V = of the block of 16, enc the fp32 encode scale:

                   fast                                exact
    per-token      A * g                               1 / enc
    enc            rcp(A * g), 0 if A * g is 0         min((1/g) / A, FLT_MAX), 1 if that is 0
    block scale    enc * (V * rcp(6))                  V * (enc * (1/6))             to e4m3
    output scale   rcp(sf * rcp(enc))                  min(1 / (sf * (1/enc)), FLT_MAX)
    code           x * output scale                    the same                      to e2m1

Two details are load-bearing: every operation rounds on its own, in this order, and the builds differ in
what they do to subnormals and zeros (`numerics/fp32.py`, and the conditions below). A NaN loses in every
maximum: a block of NaN alone has V = NaN, a row of NaN alone A = 0. Sources, in flashinfer-python
0.7.2.post1: `quantization.cuh:761-906` (CUDA, per token), `quantization_utils.cuh:431-690` (blocks),
`quantization/kernels/nvfp4_quantize.py:952` and `quantization_cute_dsl_utils.py:1755-1895` (CuTe-DSL);
`docs/flashinfer_versions.md` has what 0.7.4 does otherwise.
"""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass, field, replace

import torch

from .layouts import from_linear, to_linear
from .numerics import e2m1, e4m3
from .numerics.fp32 import FLT_MAX, Arithmetic, rcp_approx_ftz
from .numerics.subnormals import kept
from .recipe import BLOCK_SIZE, NVFP44Over6Config, NVFP44Over6ErrMode, Recipe, SfLayout

_LINEAR = SfLayout.layout_linear
_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
_SIXTH = 1.0 / 6.0  # rounds to the fp32 0x3e2aaaab, which is also rcp.approx(6)


@dataclass(frozen=True)
class Quantized:
    """A quantized [M, K] matrix.

    `steps` holds the intermediates when they were asked for, in the order they arise: fp32 tensors
    of one value a row, a block ([M, K/16]) or an element, in linear order.
    """

    codes: torch.Tensor  # [M, K/2] uint8, even column in the low nibble
    block_scales: torch.Tensor  # uint8 e4m3, the layout's [padded M, padded K/16]
    per_token_scale: torch.Tensor | None = None  # [M] fp32 decode scale, per-token mode only
    steps: dict[str, torch.Tensor] = field(default_factory=dict)


@kept
def quantize_per_token(
    x: torch.Tensor,
    base_scale_inv: float | torch.Tensor,
    recipe: Recipe,
    layout: SfLayout = _LINEAR,
    *,
    row_index: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
    keep_steps: bool = False,
) -> Quantized:
    """Quantize every row with an fp32 scale of its own.

    Contract: bitwise FlashInfer's `nvfp4_quantize(..., per_token_activation=True)` of the recipe's
    build. fp32 input follows another rule, that of FlashInfer's unexposed kernel
    (`quantization.cuh:908`), and has fast math and the CUDA build only.

    Args:
        x: [M, K] fp16, bf16 or fp32, K a multiple of 16.
        base_scale_inv: g, 1/2688 (`recipe.base_scale_inv`), a float or one fp32 element.
        row_index: int32 [>= M]; row r = row_index[b], b < M, of `x` gives row r of the result. Entries
            outside 0..M-1 are skipped; rows that no entry names are zero.
        out_scale: one fp32 element that multiplies the returned per-token scale, last.

    Raises:
        ValueError: fp32 input with exact math, 4over6 or the cute-dsl build.
    """
    if row_index is not None:
        rows = _named_rows(row_index, x.shape[0])
        part = quantize_per_token(
            x[rows], base_scale_inv, recipe, out_scale=out_scale, keep_steps=keep_steps
        )
        return _scatter_rows(part, rows, x.shape[0], layout)

    ar = Arithmetic(ftz=recipe.build == "cuda")
    g = torch.as_tensor(base_scale_inv, dtype=torch.float32, device=x.device).reshape(1)
    g = ar.flush(g)
    if x.dtype == torch.float32:
        result = _fp32_per_token(x, g, recipe, ar)
    else:
        amax = ar.flush(max_ignoring_nan(x).nan_to_num(nan=0.0, posinf=torch.inf).float())
        encode, scale = row_scales(amax, g, recipe, ar)
        tops = max_ignoring_nan(_split(x)).float()
        blocks = quantize_blocks(x.float(), tops, encode, amax, recipe, ar)
        steps = {"row_amax": amax, "encode_scale": encode, **blocks.steps}
        result = replace(blocks, per_token_scale=scale, steps=steps)
    if out_scale is not None:
        assert result.per_token_scale is not None
        scaled = ar.mul(result.per_token_scale, ar.flush(out_scale.float().reshape(1)))
        result = replace(result, per_token_scale=scaled)
    return _finish(result, layout, keep_steps)


@kept
def quantize_global_scale(
    x: torch.Tensor,
    global_scale: torch.Tensor | float | None,
    recipe: Recipe,
    layout: SfLayout = _LINEAR,
    *,
    inverse: bool = False,
    error_by_halves: bool = False,
    row_index: torch.Tensor | None = None,
    keep_steps: bool = False,
) -> Quantized:
    """Quantize with an encode scale from the caller, 448 * 6 / amax usually.

    Contract: bitwise FlashInfer's `fp4_quantize` of the recipe's build: also with one scale a row
    (`quantization.cuh:282`), `inverse` (`quantization.cuh:268`), 4over6, and e4m3 input
    (`quantization_utils.cuh:766`, `quantization_cute_dsl_utils.py:2356`).

    Args:
        x: [M, K] fp16, bf16 or float8_e4m3fn, K a multiple of 16. The CUDA build's kernel for e4m3
            knows no exact math, nor do we with it.
        global_scale: one fp32 element or M of them; None counts as 1. Not checked for 0, inf or NaN.
        inverse: `global_scale` is the decode scale.
        error_by_halves: 4over6 sums a block's errors in two halves of 8, as FlashInfer's cutlass layer
            does: its threads hold 8 elements (`cutlass_fused_moe_kernels.cuh:81`,
            `quantization_utils.cuh:639-642`).
        row_index: as for `quantize_per_token`; a scale of each row stays with its row.

    Raises:
        ValueError: 4over6 with e4m3 input.
    """
    if row_index is not None:
        rows = _named_rows(row_index, x.shape[0])
        if isinstance(global_scale, torch.Tensor) and global_scale.numel() > 1:
            global_scale = global_scale.to(x.device).reshape(-1)[rows]
        part = quantize_global_scale(
            x[rows],
            global_scale,
            recipe,
            inverse=inverse,
            error_by_halves=error_by_halves,
            keep_steps=keep_steps,
        )
        return _scatter_rows(part, rows, x.shape[0], layout)

    ar = Arithmetic(ftz=recipe.build == "cuda")
    if global_scale is None:
        global_scale = 1.0
    encode = torch.as_tensor(global_scale, dtype=torch.float32, device=x.device).reshape(-1)
    if inverse:
        encode = ar.div(1.0, encode) if recipe.math == "exact" else rcp_approx_ftz(encode)
    encode = ar.flush(encode).expand(x.shape[0])
    if x.dtype == torch.float8_e4m3fn:
        result = _e4m3_blocks(x, encode, recipe, ar)
    else:
        amax = max_ignoring_nan(_split(x)).float()
        result = quantize_blocks(x.float(), amax, encode, None, recipe, ar, error_by_halves)
    result = replace(result, steps={"encode_scale": encode, **result.steps})
    return _finish(result, layout, keep_steps)


@kept
def quantize_block_scales(x: torch.Tensor, recipe: Recipe) -> Quantized:
    """Quantize [M, K] fp32 by blocks alone: the encode scale is 1, already in the values.

    What a closed GEMM epilogue with static scales does to the intermediate, as far as is known: not
    proven on FlashInfer.
    """
    ar = Arithmetic(ftz=recipe.build == "cuda")
    amax = max_ignoring_nan(_split(x))
    return quantize_blocks(x, amax, x.new_ones(x.shape[0]), None, recipe, ar)


@kept
def dequantize(
    codes: torch.Tensor,
    block_scales: torch.Tensor,
    scale: torch.Tensor | float,
    layout: SfLayout = _LINEAR,
) -> torch.Tensor:
    """Decode codes [M, K/2] to [M, K] fp32: e2m1 * block scale, exact, times `scale`, one rounding.

    Args:
        block_scales: uint8 in `layout`.
        scale: fp32 decode scale, one element or one a row.
    """
    rows, half = codes.shape
    linear = to_linear(block_scales, rows, half * 2 // BLOCK_SIZE, layout)
    values = _split(e2m1.decode(e2m1.unpack(codes))) * e4m3.decode(linear)[..., None]
    column = torch.as_tensor(scale, dtype=torch.float32, device=codes.device).reshape(-1, 1)
    return values.flatten(-2) * column


def _split(x: torch.Tensor) -> torch.Tensor:
    """Split [M, K] into blocks [M, K/16, 16]."""
    return x.unflatten(-1, (-1, BLOCK_SIZE))


def max_ignoring_nan(x: torch.Tensor) -> torch.Tensor:
    """Largest magnitude along the last dimension; NaN where there is nothing but NaN."""
    # torch's own maxima let a NaN through. Bits of magnitudes are ordered as the magnitudes are, and
    # torch has faster maxima of integers.
    a = x.abs().nan_to_num(nan=-1.0, posinf=torch.inf)
    top = a.view(_BITS[x.dtype]).amax(-1).view(x.dtype)
    return top.masked_fill(top < 0, torch.nan)


def row_scales(
    amax: torch.Tensor, g: torch.Tensor, recipe: Recipe, ar: Arithmetic
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return encode scale and per-token scale, [M] each, of rows with the given maxima."""
    zero_row_encode = 0.0 if recipe.four_over_six else FLT_MAX
    if recipe.math == "exact":
        encode = ar.min_flt_max(ar.div(ar.div(1.0, g).expand_as(amax), amax))
        encode = torch.where(encode == 0, 1.0, encode)
        encode = torch.where(amax == 0, zero_row_encode, encode)
        return encode, torch.where(amax == 0, 0.0, ar.div(1.0, encode))
    scale = ar.mul(amax, g)
    encode = rcp_approx_ftz(scale)
    if recipe.build == "cuda":
        return torch.where(scale == 0, 0.0, encode), scale
    return torch.where(amax == 0, zero_row_encode, encode), scale


def quantize_blocks(
    values: torch.Tensor,
    amax: torch.Tensor,
    encode: torch.Tensor,
    row_amax: torch.Tensor | None,
    recipe: Recipe,
    ar: Arithmetic,
    error_by_halves: bool = False,
) -> Quantized:
    """Quantize blocks of values [M, K] with maxima [M, K/16] and encode scales [M]."""
    values, amax = ar.flush(_split(values)), ar.flush(amax)
    encode = encode[:, None]
    if recipe.four_over_six is not None:
        return _four_over_six_blocks(
            values, amax, encode, row_amax, recipe, recipe.four_over_six, ar, error_by_halves
        )
    unrounded = block_scale(amax, encode, recipe, ar)
    scale_bytes = e4m3.encode(unrounded)
    factor = output_scale(scale_bytes, encode, recipe, ar)
    zero = e4m3.decode(scale_bytes) == 0 if recipe.tests_rounded_scale else amax == 0
    factor = torch.where(zero, 0.0, factor)
    codes = _codes(values, factor)
    steps = {"block_amax": amax, "block_scale": unrounded, "output_scale": factor}
    return Quantized(e2m1.pack(codes.flatten(-2)), scale_bytes, steps=steps)


def _codes(values: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Return the codes of values [M, K/16, 16] times the factors of their blocks [M, K/16].

    The product is not flushed: what would be has the code of a zero of its sign in any case.
    """
    return e2m1.encode(values * factor[..., None])


def block_scale(
    amax: torch.Tensor, encode: torch.Tensor, recipe: Recipe, ar: Arithmetic
) -> torch.Tensor:
    """Return the scales of blocks with these maxima, before e4m3; with 4over6 those of 6."""
    if recipe.math == "fast":
        return ar.mul(encode, ar.mul(amax, _SIXTH))
    if recipe.four_over_six is not None:
        return ar.mul(ar.div(amax, e2m1.MAX), encode)
    return torch.where(amax == 0, 0.0, ar.mul(amax, ar.mul(encode, _SIXTH)))


def output_scale(
    scale_bytes: torch.Tensor, encode: torch.Tensor, recipe: Recipe, ar: Arithmetic
) -> torch.Tensor:
    """Return the factor that multiplies a block's elements before e2m1."""
    scale = e4m3.decode(scale_bytes)
    if recipe.math == "exact":
        return ar.min_flt_max(ar.div(1.0, ar.mul(scale, ar.div(1.0, encode))))
    return rcp_approx_ftz(ar.mul(scale, rcp_approx_ftz(encode)))


def _four_over_six_blocks(
    values: torch.Tensor,
    amax: torch.Tensor,
    encode: torch.Tensor,
    row_amax: torch.Tensor | None,
    recipe: Recipe,
    config: NVFP44Over6Config,
    ar: Arithmetic,
    error_by_halves: bool,
) -> Quantized:
    """Both candidates of every block; the one with the maximum at 4 only if its error is smaller."""
    unrounded6 = block_scale(amax, encode, recipe, ar)
    decode = ar.div(1.0, encode) if recipe.math == "exact" else rcp_approx_ftz(encode)
    unrounded4 = ar.mul(unrounded6, 1.5)

    def candidate(unrounded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scale_bytes = e4m3.encode(unrounded)
        factor = output_scale(scale_bytes, encode, recipe, ar)
        codes = _codes(values, factor)
        scaled = e2m1.decode(codes) * e4m3.decode(scale_bytes)[..., None]  # exact
        if config.err_use_fast_math:
            difference = ar.sub(scaled, ar.mul(values, encode[..., None]))
        else:
            dequantized = ar.mul(scaled, decode[..., None])
            if row_amax is not None:
                row = row_amax[:, None, None]
                by_row = ar.div(ar.mul(scaled, row), e2m1.MAX * config.e4m3_max)
                dequantized = torch.where(row > 0, by_row, dequantized)
            difference = ar.sub(dequantized, values)
        mse = config.err_mode == NVFP44Over6ErrMode.MSE
        term = ar.mul(difference, difference) if mse else difference.abs()
        return scale_bytes, codes, _sum_of_errors(term, error_by_halves, ar)

    bytes4, codes4, error4 = candidate(unrounded4)
    bytes6, codes6, error6 = candidate(unrounded6)
    take4 = error4 < error6
    zero = amax == 0
    scale_bytes = torch.where(take4, bytes4, bytes6).masked_fill(zero, 0)
    codes = torch.where(take4[..., None], codes4, codes6).masked_fill(zero[..., None], 0)
    steps = {"block_amax": amax, "block_scale": unrounded6, "error_of_4": error4}
    steps |= {"error_of_6": error6}
    return Quantized(e2m1.pack(codes.flatten(-2)), scale_bytes, steps=steps)


def _sum_of_errors(terms: torch.Tensor, by_halves: bool, ar: Arithmetic) -> torch.Tensor:
    """Sum [M, K/16, 16] to [M, K/16]: the order of the sum decides near ties."""
    if by_halves:
        halves = terms.unflatten(-1, (2, BLOCK_SIZE // 2))
        return ar.add(*_sum_of_errors(halves, False, ar).unbind(-1))
    total = terms[..., 0]
    for i in range(1, terms.shape[-1]):
        total = ar.add(total, terms[..., i])
    return total


def _e4m3_blocks(
    x: torch.Tensor, encode: torch.Tensor, recipe: Recipe, ar: Arithmetic
) -> Quantized:
    """e4m3 input is first rescaled into fp16; the CUDA kernel then has an output scale of its own."""
    if recipe.four_over_six is not None:
        raise ValueError("x is float8_e4m3fn; 4over6 needs fp16 or bf16")
    exact = recipe.math == "exact" and recipe.build == "cute-dsl"
    prescale = ar.mul(ar.div(1.0, encode) if exact else rcp_approx_ftz(encode), e2m1.MAX)
    values = ar.mul(x.float(), prescale[:, None]).half()
    amax = max_ignoring_nan(_split(values)).float()
    if recipe.build == "cute-dsl":
        return quantize_blocks(values.float(), amax, encode, None, recipe, ar)
    unrounded = ar.mul(encode[:, None], ar.mul(amax, _SIXTH))
    scale_bytes = e4m3.encode(unrounded)
    output_scale = ar.mul(rcp_approx_ftz(e4m3.decode(scale_bytes)), encode[:, None])
    output_scale = torch.where(unrounded == 0, 0.0, output_scale)
    codes = _codes(_split(values.float()), output_scale)
    steps = {"block_amax": amax, "block_scale": unrounded, "output_scale": output_scale}
    return Quantized(e2m1.pack(codes.flatten(-2)), scale_bytes, steps=steps)


def _fp32_per_token(x: torch.Tensor, g: torch.Tensor, recipe: Recipe, ar: Arithmetic) -> Quantized:
    """fp32 input: codes from the block's own maximum, the block scale from both afterwards."""
    if not recipe.is_fast_alone:
        raise ValueError(
            f"x is fp32; its recipe must be fast, without 4over6, build cuda: {recipe}"
        )
    values = ar.flush(_split(x))
    amax = max_ignoring_nan(values).nan_to_num(nan=0.0, posinf=torch.inf)
    row_amax = amax.amax(-1)
    scale = ar.mul(row_amax, g)
    output_scale = torch.where(amax == 0, 0.0, ar.mul(rcp_approx_ftz(amax), e2m1.MAX))
    denominator = ar.mul(scale[:, None], output_scale)
    unrounded = torch.where(denominator == 0, 0.0, rcp_approx_ftz(denominator))
    codes = _codes(values, output_scale)
    steps = {
        "row_amax": row_amax,
        "block_amax": amax,
        "output_scale": output_scale,
        "block_scale": unrounded,
    }
    return Quantized(e2m1.pack(codes.flatten(-2)), e4m3.encode(unrounded), scale, steps)


def _named_rows(row_index: torch.Tensor, m: int) -> torch.Tensor:
    """The rows that the first M entries of a row index name."""
    rows = row_index[:m]
    return rows[(rows >= 0) & (rows < m)].long()


def _scatter_rows(part: Quantized, rows: torch.Tensor, m: int, layout: SfLayout) -> Quantized:
    """The quantized rows at their places among M, zeros elsewhere."""

    def place(t: torch.Tensor) -> torch.Tensor:
        full = t.new_zeros((m, *t.shape[1:]))
        full[rows] = t
        return full

    token_scale = part.per_token_scale
    return Quantized(
        place(part.codes),
        from_linear(place(part.block_scales), layout),
        None if token_scale is None else place(token_scale),
        {name: place(step) for name, step in part.steps.items()},
    )


def _finish(result: Quantized, layout: SfLayout, keep_steps: bool) -> Quantized:
    return replace(
        result,
        block_scales=from_linear(result.block_scales, layout),
        steps=result.steps if keep_steps else {},
    )
