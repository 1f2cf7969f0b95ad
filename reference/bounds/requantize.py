"""The requantization of an interval of intermediates; `moe.py` has the argument."""

# SPDX-License-Identifier: Apache-2.0
import torch

from ..moe.activations import Activations, hidden_values
from ..numerics import e2m1, e4m3
from ..numerics.fp32 import Arithmetic, rcp_approx_ftz
from ..quantize import block_scale, max_ignoring_nan, output_scale, quantize_blocks, row_scales
from ..recipe import BLOCK_SIZE, NVFP44Over6ErrMode, Recipe
from .interval import LARGEST, SMALLEST, Interval, choose, hull, rounded, unless

CANDIDATES = 16
"""The most candidates for the maximum of a row, and for the scale of a block."""
_INFINITE = 0x7F80  # bf16


def requantize_rows(
    middle: Interval, recipe: Recipe
) -> tuple[Interval, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bound the per-token requantization of bf16 numbers [N, I].

    Returns:
        code times block scale [C, I] of every candidate for a row's maximum; its per-token scale [C];
        the row of each candidate [C]; of which rows [N] nothing is known. A row with more than
        `CANDIDATES` has one, its largest, and every value that codes and block scales can have.
    """
    ar = Arithmetic(ftz=recipe.build == "cuda")
    row, amax, many = _row_maxima(middle, ar.ftz)
    unknown = middle.unknown.any(1)
    if recipe.math == "fast":  # one maximum, infinite, makes NaN of the row, whatever else there is
        unknown &= many
    unknown |= many & _may_be_nan(middle, recipe)
    encode, scale = row_scales(amax, amax.new_full((1,), recipe.base_scale_inv), recipe, ar)
    top = amax.double()[:, None]
    numbers = middle.map(lambda t: t.masked_fill((unknown | many)[:, None], 0.0))[row]
    numbers = numbers.map(lambda t: torch.minimum(torch.maximum(t, -top), top))
    values = _blocks(numbers, encode, amax, recipe, ar)
    if recipe.math == "fast":
        # A block with an infinite element gets the scale 0 * inf, NaN, and no sum without it is taken.
        values = values.map(lambda t: t.masked_fill((amax == torch.inf)[:, None], torch.nan))
    # With many maxima, all that codes and block scales can be, under the largest scale of the row.
    every = torch.full_like(values.low, e2m1.MAX * e4m3.MAX)
    return choose(many[row][:, None], Interval(-every, every), values), scale, row, unknown


def _may_be_nan(middle: Interval, recipe: Recipe) -> torch.Tensor:
    """Mark the rows [N] in which a block may have the scale NaN."""
    may = middle.nan.any(1) | middle.magnitude.isinf().any(1)
    if recipe.math == "fast" and recipe.build == "cute-dsl":
        # Where the encode scale, 1 / (A g), is infinite a block of zeros has the scale inf * 0.
        may |= middle.mignitude.amax(1) * recipe.base_scale_inv < 2 * SMALLEST
    return may


def requantize_blocks(
    middle: Interval, recipe: Recipe, encode: torch.Tensor | None = None
) -> Interval:
    """Bound code times block scale with static scales, from fp32 or bf16 numbers [N, I].

    The closed kernels may be built with fast or exact math: the hull of both.

    Args:
        encode: the fp32 encode scale; None where the numbers hold it.
    """
    rows = middle.low.shape[0]
    ar = Arithmetic(ftz=recipe.build == "cuda")
    scale = middle.low.new_ones(1).float() if encode is None else ar.flush(encode)
    numbers = rounded(torch.float32, middle)
    fast, exact = (
        _blocks(
            numbers,
            scale.expand(rows),
            None,
            Recipe(math, recipe.four_over_six, recipe.build),
            ar,
            error_by_halves=encode is not None,
        )
        for math in ("fast", "exact")
    )
    return hull(fast, exact)


def _row_maxima(middle: Interval, ftz: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return each candidate's row and maximum (fp32, bf16 numbers), and mark rows [N] with too many.

    NaN is no maximum. An element that may be anything may be infinite.
    """

    def place(maximum: torch.Tensor) -> torch.Tensor:
        """Return the numbers that a maximum may be, in ascending order."""
        bits = maximum.to(torch.bfloat16).view(torch.int16).int()
        return (bits - subnormal).clamp(min=0)

    subnormal = 0x7F if ftz else 0  # as many are zero too
    least = place(middle.mignitude.amax(1))
    most = place(middle.magnitude.masked_fill(middle.nan, 0.0).amax(1))
    count = most - least + 1
    many = (count > CANDIDATES) | (count > 1) & middle.unknown.any(1)
    least, count = torch.where(many, most, least), torch.where(many, 1, count)
    row = torch.arange(count.numel(), dtype=torch.int64, device=count.device).repeat_interleave(
        count
    )
    first = (count.cumsum(0) - count)[row]
    step = torch.arange(row.numel(), dtype=torch.int64, device=row.device) - first
    bits = least[row] + step
    bits = torch.where(bits > 0, bits + subnormal, 0)
    amax = bits.to(torch.int16).view(torch.bfloat16).float()
    return row, amax, many


def _blocks(
    x: Interval,
    encode: torch.Tensor,
    row_amax: torch.Tensor | None,
    recipe: Recipe,
    ar: Arithmetic,
    *,
    error_by_halves: bool = False,
) -> Interval:
    """Bound code times block scale, [N, K], of rows whose encode scale [N] is known."""
    parts = x.map(lambda t: t.unflatten(-1, (-1, BLOCK_SIZE)))
    # Blocks of points have one outcome, that of the quantizer itself. Of those with an element that may
    # be anything, or with an encode scale that makes NaN of a maximum of zero, nothing is known.
    known = parts.single.all(-1)[..., None]
    open_ = (parts.unknown.any(-1) | ~encode.isfinite()[:, None])[..., None]
    inner = parts.map(lambda t: t.masked_fill(known | open_, 0.0))
    largest = inner.magnitude.masked_fill(inner.nan, 0.0).amax(-1)
    tops = Interval(inner.mignitude.amax(-1), largest)
    column = encode[:, None]
    unrounded = tops.map(lambda t: block_scale(ar.flush(t.float()), column, recipe, ar))
    six = _Candidate(inner, unrounded, column, row_amax, recipe, ar)
    value = six.value
    if recipe.four_over_six is not None:
        four = _Candidate(
            inner, unrounded.map(lambda t: ar.mul(t, 1.5)), column, row_amax, recipe, ar
        )
        surely4 = (four.error.high < six.error.low)[..., None]
        surely6 = (four.error.low >= six.error.high)[..., None]
        both = hull(six.value, four.value)
        value = choose(surely4, four.value, choose(surely6, six.value, both))
    value = unless(open_, value)
    points = parts.low.float().masked_fill(~known, 0.0)
    q = quantize_blocks(
        points.flatten(-2), max_ignoring_nan(points), encode, row_amax, recipe, ar, error_by_halves
    )
    exact = Interval.point(hidden_values(Activations(q.codes, q.block_scales)).view_as(parts.low))
    return choose(known, exact, value).map(lambda t: t.flatten(-2))


class _Candidate:
    """Bound blocks [N, K/16, 16] under one of the scales that 4over6 tries, or the only one.

    `value` is code times scale; `error`, with 4over6, what is compared: both hulls over the e4m3 bytes
    that the block's maximum may lead to. Where those are more than `CANDIDATES`, all codes are
    allowed under the largest.
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
        many = (last - first >= CANDIDATES)[..., None]
        first = torch.where(many[..., 0], last, first)
        self.value: Interval
        self.error: Interval
        for step in range(int((last - first).amax()) + 1 if first.numel() else 1):
            scale_bytes = torch.minimum(first + step, last).to(torch.uint8)
            scale = e4m3.decode(scale_bytes).double()[..., None]
            factor = output_scale(scale_bytes, encode, recipe, ar)[..., None]
            # Under a scale of zero every code stands for zero.
            codes = (_code_values(t, factor, ar) for t in (parts.low, parts.high))
            value = Interval(*(torch.where(scale == 0, 0.0, scale * c) for c in codes))
            every = e2m1.MAX * scale
            value = choose(many, Interval(-every, every), value)
            self.value = value if step == 0 else hull(self.value, value)
            if recipe.four_over_six is not None:
                error = _error(value, parts, encode, row_amax, recipe, ar)
                error = unless(many[..., 0], error)
                self.error = error if step == 0 else hull(self.error, error)


def _code_values(x: torch.Tensor, factor: torch.Tensor, ar: Arithmetic) -> torch.Tensor:
    return e2m1.decode(e2m1.encode(ar.mul(ar.flush(x.float()), factor))).double()


def _error(
    value: Interval,
    parts: Interval,
    encode: torch.Tensor,
    row_amax: torch.Tensor | None,
    recipe: Recipe,
    ar: Arithmetic,
) -> Interval:
    """Bound the errors [N, K/16] that 4over6 compares.

    Its roundings, some 20 of 2^-24, lie within 2^-19. What is below 2^-126 is flushed, or rounds to a
    multiple of 2^-149: thrice on the way to a difference, once in each square and each sum. What is
    above fp32's largest number is infinite; errors that both are choose 6.
    """
    config = recipe.four_over_six
    assert config is not None
    lost = SMALLEST if ar.ftz else 2.0**-149
    if config.err_use_fast_math:
        wanted, got = parts.map(lambda t: t * encode.double()[..., None]), value
    elif row_amax is not None:
        by_row = _fp32(value.map(lambda t: t * row_amax.double()[:, None, None]))
        wanted, got = parts, by_row.map(lambda t: t / (e2m1.MAX * config.e4m3_max))
    else:
        exact = recipe.math == "exact"
        decode = ar.div(1.0, encode) if exact else rcp_approx_ftz(encode)
        wanted, got = parts, _fp32(value.map(lambda t: t * decode.double()[..., None]))
    d = Interval(got.low - wanted.high, got.high - wanted.low)
    # A difference of close numbers keeps the roundings of both.
    got_size, wanted_size = (i.magnitude.nan_to_num(posinf=0.0) for i in (got, wanted))
    slack = (got_size + wanted_size) * 2.0**-21 + 4 * lost
    size = Interval(d.mignitude - slack, d.magnitude + slack).map(lambda t: t.clamp(min=0))
    if config.err_mode == NVFP44Over6ErrMode.MSE:
        size = size.map(torch.square)
    total = size.map(lambda t: t.sum(-1))
    sums = 2 * BLOCK_SIZE * lost
    low, high = total.low * (1 - 2.0**-19) - sums, total.high * (1 + 2.0**-19) + sums
    return _fp32(Interval(low, high))


def _fp32(x: Interval) -> Interval:
    """Widen numbers by 2^-19 of themselves; they are infinite where fp32 cannot hold them."""
    margin = 1 + 2.0**-19
    low = torch.where(x.low < -LARGEST / margin, -torch.inf, x.low)
    high = torch.where(x.high > LARGEST / margin, torch.inf, x.high)
    low = torch.where(x.low > LARGEST * margin, torch.inf, low)
    return Interval(low, torch.where(x.high < -LARGEST * margin, -torch.inf, high))
