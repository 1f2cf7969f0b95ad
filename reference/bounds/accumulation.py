"""Sums of exact products that any order may compute, and how far they are from the true sums.

This file states points 1 and 9 of `moe.py`.

Let P and -N be the sums of the positive and of the negative terms, errors included. A sum in any order
lies in [-N, P], and so do its parts. A part that fp32 cannot hold is infinite, and stays so:

- neither P nor N exceed fp32: every part is a number, and point 1 holds;
- P alone does: the sum is a number of point 1's, or +inf; +inf for sure where all of those exceed fp32;
- N alone: likewise -inf;
- both: inf - inf may come, and nothing is claimed.

Infinite and NaN operands: inf times 0, NaN times anything and +inf plus -inf are NaN in every order;
else infinite terms of one sign decide, unless finite ones exceed fp32 towards the other. An interval
with an infinite end may be times 0: nothing is claimed of sums over it.

A fold adds in a given order, so that its partial sums are known: `fold.py`.
"""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass, replace

import torch

from .fold import Fold, Products, chunks_of, error_of_fold, unit_of
from .interval import LARGEST, Interval, U, choose, fp32_range, unless

_FLUSHED = 2.0**-118
"""The most that a product loses to flushing: 2^-126, of products held times 2^-8 until the end."""


@dataclass(frozen=True)
class Accumulation:
    """The largest error of a sum of exact products, in units of B.

    `per_term` for each nonzero term, `per_step` for each `step` of terms. With `chunk` the sum is a
    tree over contiguous ranges of whole chunks of that many terms, each of which may have any order.
    With `fold` the order of the steps of the fold is given, and that inside each of them is not.
    """

    name: str
    per_term: float
    per_step: float
    step: int
    source: str
    chunk: int | None = None
    fold: Fold | None = None

    def error(self, largest: torch.Tensor, terms: torch.Tensor | int, k: int) -> torch.Tensor:
        """Return an upper bound; `largest` is B, `terms` the number of nonzero products among K."""
        # 1.001 for the second order: the rounded partial sums exceed B by less than K * U.
        return largest * (terms * self.per_term + -(-k // self.step) * self.per_step) * 1.001


FP32 = Accumulation("fp32", U, 0.0, 1, "IEEE 754: round to nearest, any tree of additions")
ANY_ORDER = Accumulation(
    "any order",
    U,
    3 * U,
    8,
    "steps of at least 8 products, aligned to the largest term with one more bit than fp32 has, dropped "
    "below, the result truncated to fp32; covers FP32. "
    "`nvfp4_moe.differential.accumulation` asks a backend",
)
CONTIGUOUS = replace(
    ANY_ORDER,
    name="contiguous",
    source=ANY_ORDER.source
    + "; tiles of at most 256 of K, ascending or split, as our kernels' are; "
    "within a tile those decode every second or fourth column first, and on sm_90 a step has "
    "four columns of each 32 of 128",
    chunk=256,
)
KFOLD = replace(
    ANY_ORDER,
    name="kfold",
    source="FlashInfer 0.7.4, `gemm/batch_invariant/spec.py:267`: one step of 64 after another from +0; "
    "what is inside a step is not stated, so it may be: " + ANY_ORDER.source,
    fold=Fold(),
)


def kchunk(n: int, k: int) -> Accumulation:
    """Return the accumulation of a batch-invariant `mm_fp4` of FlashInfer 0.7.4 for b [K, N].

    It is `KFOLD`, or that of equal chunks of K, whose sums are added in order
    (`gemm/batch_invariant/spec.py:284`). The rule holds on sm_100 and sm_103.
    """
    chunks = chunks_of(n, k)
    if chunks == 1:
        return KFOLD
    return replace(KFOLD, name=f"kchunk[{chunks}]", fold=replace(Fold(), chunks=chunks))


def sum_of_products(x: Interval, w: torch.Tensor, accumulation: Accumulation) -> Interval:
    """Bound x [N, K] times w [M, K] transposed, [N, M]; w, and x if it is a point, are fp32 numbers."""
    if bool((x.low.isfinite() & x.high.isfinite()).all()) and bool(w.isfinite().all()):
        return _of_finite(x, w, accumulation)
    finite = x.low.isfinite() & x.high.isfinite()
    single = x.single
    # NaN where a term is, or where two are infinite and differ in sign; else 0 or an infinity.
    decided = x.low.masked_fill(finite | ~single, 0.0) @ w.double().T
    numbers = x.map(lambda end: end.masked_fill(~finite, 0.0))
    total = _of_finite(numbers, w.masked_fill(~w.isfinite(), 0.0), accumulation)
    against = torch.where(decided > 0, total.low, -total.high) == -torch.inf
    unknown = decided.isinf() & against | (~finite & ~single).any(1)[:, None]
    total = choose(decided == 0, total, Interval.point(decided))
    return unless(unknown & ~total.nan, total)


def _of_finite(x: Interval, w: torch.Tensor, accumulation: Accumulation) -> Interval:
    k, w64 = w.shape[1], w.double()
    points = x.is_point or bool((x.low == x.high).all())
    if points:
        x = Interval.point(x.low)
    magnitude, sizes = x.magnitude, w64.abs()
    centre = x.low if points else (x.low + x.high) / 2
    radius = None if points else (x.high - x.low) / 2
    size = magnitude @ sizes.T
    low = high = centre @ w64.T
    if radius is not None:
        spread = radius @ sizes.T
        low, high = low - spread, high + spread
    positive, negative = (size + high) / 2, (size - low) / 2
    largest = torch.maximum(positive, negative)
    if accumulation.chunk is not None:
        ranges = _largest_of_ranges(centre, radius, magnitude, w64, sizes, accumulation.chunk)
        largest = torch.minimum(largest, ranges)
    terms = torch.minimum((magnitude != 0).sum(1)[:, None], (w != 0).sum(1)[None, :])
    error = accumulation.error(largest, terms, k) + size * k * 2.0**-52  # these sums are fp64
    flushed = terms * _FLUSHED
    if points:  # of an interval's inner values nothing is known: they have no common divisor
        unit = unit_of(x.low.float())[:, None] * unit_of(w)[None, :]
        error = torch.where(largest <= unit * 2**24, 0.0, error)
        flushed = torch.where(unit >= _FLUSHED, 0.0, flushed)
    if accumulation.fold is not None:
        products = Products(centre, radius, magnitude, w64, sizes)
        of_fold = error_of_fold(accumulation.fold, products, accumulation.error)
        error = torch.minimum(error, of_fold)
    error = error + flushed
    low, high = low - error, high + error
    high = torch.where((high > LARGEST) | (positive + error > LARGEST), torch.inf, high)
    low = torch.where((low < -LARGEST) | (negative + error > LARGEST), -torch.inf, low)
    return fp32_range(Interval(low, high))


def _largest_of_ranges(
    centre: torch.Tensor,
    radius: torch.Tensor | None,
    magnitude: torch.Tensor,
    w: torch.Tensor,
    sizes: torch.Tensor,
    chunk: int,
) -> torch.Tensor:
    """Bound the magnitude of every contiguous range of chunks, and of every part of a chunk."""
    total = centre.new_zeros(centre.shape[0], w.shape[0])
    least, most, spread, inside = total, total, total, total
    for k in range(0, w.shape[1], chunk):
        part = slice(k, k + chunk)
        total = total + centre[:, part] @ w[:, part].T
        if radius is not None:
            spread = spread + radius[:, part] @ sizes[:, part].T
        inside = torch.maximum(inside, magnitude[:, part] @ sizes[:, part].T)
        least, most = torch.minimum(least, total), torch.maximum(most, total)
    return most - least + spread + inside
