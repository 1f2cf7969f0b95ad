"""The intervals of sums whose steps have a given order: FlashInfer's batch-invariant `mm_fp4`.

`tests/backends/test_batch_invariant_oracle.py` compares the order with FlashInfer's own definition.
"""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import dense_cases
import pytest
import torch
from assertions import assert_inside

from nvfp4_moe.differential.conforming import cut_step, folded, truncating
from nvfp4_moe.reference import dense
from nvfp4_moe.reference.bounds.accumulation import ANY_ORDER, KFOLD, kchunk, sum_of_products
from nvfp4_moe.reference.bounds.dense import mm_fp4_bounds
from nvfp4_moe.reference.bounds.fold import Fold, Products, error_of_fold
from nvfp4_moe.reference.bounds.interval import Interval

LARGE, SMALL = 2.0**20, 2.0**-6
"""No fp32 number has bits of both."""


def chunked(chunks):
    return replace(KFOLD, name=f"kchunk[{chunks}]", fold=Fold(chunks=chunks))


def products(k, n=4, m=8, seed=0):
    """[N, K] and [M, K] of bf16 numbers, with blocks of very different sizes."""
    g = torch.Generator().manual_seed(seed + k)
    size = torch.exp2(torch.randint(-12, 12, (k // 16, 1), generator=g).float())
    x = (torch.randn(n, k // 16, 16, generator=g) * size).flatten(1).bfloat16()
    return x.float(), torch.randn(m, k, generator=g).bfloat16().float()


def of_steps(*values):
    """x [1, 64 * steps] and w [1, ...] whose products in a step are the value and zeros."""
    x = torch.zeros(1, 64 * len(values))
    x[0, ::64] = torch.tensor(values)
    return x, torch.ones_like(x)


def step_of_eights(x, w, g):
    """A fold whose steps add 8 products at a time, in an order drawn anew for each step."""
    terms = (x[:, None] * w[None]).double()
    total = torch.zeros(terms.shape[:2], dtype=torch.float64)
    for k in range(0, terms.shape[-1], 64):
        step = terms[..., k : k + 64]
        for part in step[..., torch.randperm(step.shape[-1], generator=g)].split(8, -1):
            total = cut_step(total, part, 1)
    return total.float()


@pytest.mark.parametrize("k", [16, 208, 768])
def test_folds_are_inside_and_the_interval_is_narrower(k):
    g = torch.Generator().manual_seed(k)
    for seed in range(2):
        x, w = products(k, seed=seed)
        allowed = sum_of_products(Interval.point(x), w, KFOLD)
        wider = sum_of_products(Interval.point(x), w, ANY_ORDER)
        assert (allowed.low >= wider.low).all() and (allowed.high <= wider.high).all()
        for bits in (1, 2, 20):
            assert_inside(folded(Fold(), bits)(x, w), allowed, f"{bits} more bits")
        assert_inside(step_of_eights(x, w, g), allowed, "another order inside the steps")
        exact = (x.double() @ w.double().T).float()
        assert_inside(exact, allowed, "rounded once")


@pytest.mark.parametrize("chunks", [2, 4, 8])
def test_chunks_are_inside(chunks):
    for seed in range(2):
        x, w = products(1024, seed=seed)
        allowed = sum_of_products(Interval.point(x), w, chunked(chunks))
        for bits in (1, 20):
            assert_inside(folded(Fold(chunks=chunks), bits)(x, w), allowed, f"{bits} more bits")


def test_it_is_much_narrower_where_the_sum_grows_late():
    x, w = products(1024)
    x, w = x.abs(), w.abs()
    x[:, :960] *= 2.0**-10
    fold, wider = (sum_of_products(Interval.point(x), w, a) for a in (KFOLD, ANY_ORDER))
    ratio = (wider.high - wider.low) / (fold.high - fold.low)
    assert ratio.min() > 4


def test_intervals_that_hold_every_value_of_their_factors():
    x, w = products(512)
    around = Interval(x.double() - x.abs() / 64, x.double() + x.abs() / 64)
    g = torch.Generator().manual_seed(0)
    for accumulation in (KFOLD, chunked(2)):
        allowed = sum_of_products(around, w, accumulation)
        for _ in range(8):
            inner = x * (1 + (torch.rand(x.shape, generator=g) * 2 - 1) / 65)
            assert_inside(folded(accumulation.fold, 1)(inner, w), allowed, accumulation.name)


def interleaved(x, w):
    """The fold of steps 0, 4, 1, 5, ..., as of two halves of K side by side."""
    order = torch.arange(512).view(2, 4, 64).transpose(0, 1).flatten()
    return folded(Fold(), 1)(x[:, order], w)


@pytest.mark.parametrize(
    ("accumulation", "values", "other"),
    [
        # The large terms are gone when the small one comes: the fold is exact.
        (KFOLD, (LARGE, -LARGE, SMALL), lambda x, w: folded(Fold(), 1)(x.flip(1), w)),
        (KFOLD, (LARGE, 0.0, -LARGE, SMALL), folded(Fold(chunks=2), 1)),
        (KFOLD, (LARGE, 0.0, -LARGE, 0.0, SMALL, 0.0, 0.0, 0.0), interleaved),
        (chunked(2), (SMALL, 0.0, LARGE, -LARGE), folded(Fold(), 1)),
        (chunked(2), (SMALL, 0.0, LARGE, -LARGE), folded(Fold(chunks=4), 1)),
    ],
    ids=["reversed", "two chunks", "interleaved", "one chunk", "four chunks"],
)
def test_a_run_that_folds_otherwise_is_outside(accumulation, values, other):
    x, w = of_steps(*values)
    allowed = sum_of_products(Interval.point(x), w, accumulation)
    assert allowed.low == allowed.high == SMALL
    assert_inside(folded(accumulation.fold, 1)(x, w), allowed, accumulation.name)
    assert not allowed.contains(other(x, w)).any()
    assert sum_of_products(Interval.point(x), w, ANY_ORDER).contains(other(x, w)).all()


def test_the_errors_of_steps_and_of_chunks_are_needed():
    x, w = (t.abs() for t in products(4096, n=16, m=64))
    zero = {"per_term": 0.0, "per_step": 0.0}
    points = Interval.point(x)
    found = sum_of_products(points, w, replace(KFOLD, **zero))
    assert not found.contains(folded(Fold(), 1)(x, w)).all()
    # Chunks whose sums have 24 bits, and a sum of 25, which the last addition rounds.
    x, w = (t.double() for t in of_steps(2.0**24, 0.0, 3.0, 0.0))
    exact = Products(x, None, x.abs(), w, w.abs())
    error = error_of_fold(Fold(chunks=2), exact, lambda largest, *_: torch.zeros_like(largest))
    off = folded(Fold(chunks=2), 1)(x.float(), w.float()).double() - (2.0**24 + 3)
    assert off == 1 and off <= error <= 2


def test_a_dense_product_by_its_fold():
    """Codes, scales and alpha as in serving; an output of 16 bits in place of fp32 sums is outside."""
    case = dense_cases.real(33, 16, 1024)
    x, w = dense.operands(case.a, case.b_rows.T, case.a_scales, case.b_scales.T)
    accumulation = kchunk(16, 1024)
    assert accumulation.name == "kchunk[4]" and accumulation.fold == Fold(chunks=4)
    assert kchunk(4096, 1024) is KFOLD
    for named in (KFOLD, accumulation):
        allowed = mm_fp4_bounds(**case.arguments, accumulation=named)
        total = folded(named.fold, 1)(x, w)
        got = (total * case.alpha[:, None]).bfloat16()
        assert_inside(got, allowed, named.name)
        coarse = (truncating(64, -9)(x, w) * case.alpha[:, None]).bfloat16()
        assert not allowed.contains(coarse).all()
