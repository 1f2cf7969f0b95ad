"""The requantization of an interval of intermediates; `bounds.py` has the argument."""

# SPDX-License-Identifier: Apache-2.0
import torch

from . import e2m1, e4m3
from .fp32 import Arithmetic
from .interval import Interval, choose, hull, rounded
from .moe import Activations, hidden_values
from .quantize import block_scale, output_scale, quantize_blocks, row_scales
from .recipe import BLOCK_SIZE, NVFP44Over6ErrMode, Recipe

CANDIDATES = 16
"""Maxima of one row that are carried on apart."""


def requantize_rows(
    middle: Interval, recipe: Recipe
) -> tuple[Interval, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per token, of bf16 numbers [N, I].

    Returns:
        code times block scale [C, I] of every candidate for a row's maximum; its per-token scale [C];
        the row of each candidate [C]; which rows [N] have too many, or none that is finite.
    """
    row, amax, unknown = _row_maxima(middle)
    ar = Arithmetic(ftz=recipe.build == "cuda")
    encode, scale = row_scales(amax, amax.new_full((1,), recipe.base_scale_inv), recipe, ar)
    top = amax.double()[:, None]
    numbers = middle[row].map(lambda t: torch.minimum(torch.maximum(t, -top), top))
    return _blocks(numbers, encode, amax, recipe, ar), scale, row, unknown


def requantize_blocks(
    middle: Interval, recipe: Recipe, encode: torch.Tensor | None = None
) -> Interval:
    """With static scales, of fp32 or bf16 numbers [N, I]: code times block scale.

    The closed kernels may be built with fast or exact math: the hull of both.

    Args:
        encode: the fp32 encode scale; None where the numbers hold it.
    """
    rows = middle.low.shape[0]
    scale = middle.low.new_ones(rows).float() if encode is None else encode.expand(rows)
    numbers = rounded(torch.float32, middle)
    ar = Arithmetic(ftz=recipe.build == "cuda")
    fast, exact = (
        _blocks(numbers, scale, None, Recipe(math, recipe.four_over_six, recipe.build), ar)
        for math in ("fast", "exact")
    )
    return hull(fast, exact)


def _row_maxima(middle: Interval) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(row of each candidate, its maximum fp32, which rows [N] have too many): bf16 numbers."""
    least = middle.mignitude.amax(1).to(torch.bfloat16).view(torch.int16).int()
    most = middle.magnitude.amax(1).to(torch.bfloat16).view(torch.int16).int()
    count = most - least + 1
    unknown = (count > CANDIDATES) | (most >= 0x7F80) | middle.low.isnan().any(1)
    count = torch.where(unknown, 1, count)
    row = torch.arange(count.numel(), dtype=torch.int64, device=count.device).repeat_interleave(
        count
    )
    first = (count.cumsum(0) - count)[row]
    step = torch.arange(row.numel(), dtype=torch.int64, device=row.device) - first
    amax = (least[row] + step).to(torch.int16).view(torch.bfloat16).float()
    return row, torch.where(unknown[row], 1.0, amax), unknown


def _blocks(
    x: Interval,
    encode: torch.Tensor,
    row_amax: torch.Tensor | None,
    recipe: Recipe,
    ar: Arithmetic,
) -> Interval:
    """Code times block scale, [N, K], of rows whose encode scale [N] is known."""
    parts = x.map(lambda t: t.unflatten(-1, (-1, BLOCK_SIZE)))
    tops = Interval(parts.mignitude.amax(-1), parts.magnitude.amax(-1))
    column = encode[:, None]
    unrounded = tops.map(lambda t: block_scale(t.float(), column, recipe, ar))
    six = _Candidate(parts, unrounded, column, row_amax, recipe, ar)
    value = six.value
    if recipe.four_over_six is not None:
        four = _Candidate(
            parts, unrounded.map(lambda t: ar.mul(t, 1.5)), column, row_amax, recipe, ar
        )
        surely4 = (four.error.high < six.error.low)[..., None]
        surely6 = (four.error.low >= six.error.high)[..., None]
        both = hull(six.value, four.value)
        value = choose(surely4, four.value, choose(surely6, six.value, both))
    # Blocks of points have one outcome, that of the quantizer itself.
    known = (parts.low == parts.high).all(-1)[..., None]
    q = quantize_blocks(x.low.float(), tops.low.float(), encode, row_amax, recipe, ar)
    exact = Interval.point(hidden_values(Activations(q.codes, q.block_scales)).view_as(parts.low))
    return choose(known, exact, value).map(lambda t: t.flatten(-2))


class _Candidate:
    """Blocks [N, K/16, 16] under one of the scales that 4over6 tries, or the only one.

    `value` is code times scale; `error`, with 4over6, what is compared: both hulls over the e4m3 bytes
    that the block's maximum may lead to.
    """

    def __init__(
        self,
        parts: Interval,
        unrounded: Interval,
        encode: torch.Tensor,
        row_amax: torch.Tensor | None,
        recipe: Recipe,
        ar: Arithmetic,
    ):
        first, last = (e4m3.encode(t.float()).int() for t in (unrounded.low, unrounded.high))
        self.value: Interval
        self.error: Interval
        for step in range(int((last - first).amax()) + 1 if first.numel() else 1):
            scale_bytes = torch.minimum(first + step, last).to(torch.uint8)
            scale = e4m3.decode(scale_bytes).double()[..., None]
            factor = output_scale(scale_bytes, encode, recipe, ar)[..., None]
            # Under a scale of zero every code stands for zero.
            codes = (_code_values(t, factor, ar) for t in (parts.low, parts.high))
            value = Interval(*(torch.where(scale == 0, 0.0, scale * c) for c in codes))
            self.value = value if step == 0 else hull(self.value, value)
            if recipe.four_over_six is not None:
                error = _error(value, parts, encode, row_amax, recipe)
                self.error = error if step == 0 else hull(self.error, error)


def _code_values(x: torch.Tensor, factor: torch.Tensor, ar: Arithmetic) -> torch.Tensor:
    return e2m1.decode(e2m1.encode(ar.mul(ar.flush(x.float()), factor))).double()


def _error(
    value: Interval,
    parts: Interval,
    encode: torch.Tensor,
    row_amax: torch.Tensor | None,
    recipe: Recipe,
) -> Interval:
    """What 4over6 compares, [N, K/16]: its roundings, some 20 of 2^-24, lie within 2^-19."""
    config = recipe.four_over_six
    assert config is not None
    enc = encode.double()[..., None]
    if config.err_use_fast_math:
        wanted, got = parts.map(lambda t: t * enc), value
    elif row_amax is not None:
        unit = row_amax.double()[:, None, None] / (e2m1.MAX * config.e4m3_max)
        wanted, got = parts, value.map(lambda t: t * unit)
    else:
        wanted, got = parts, value.map(lambda t: t / enc)
    d = Interval(got.low - wanted.high, got.high - wanted.low)
    # A difference of close numbers keeps the roundings of both.
    slack = (got.magnitude + wanted.magnitude) * 2.0**-21
    size = Interval(d.mignitude - slack, d.magnitude + slack).map(lambda t: t.clamp(min=0))
    if config.err_mode == NVFP44Over6ErrMode.MSE:
        size = size.map(torch.square)
    total = size.map(lambda t: t.sum(-1))
    return Interval(total.low * (1 - 2.0**-19), total.high * (1 + 2.0**-19))
