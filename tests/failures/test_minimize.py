"""A failing tensor or fused call is made small: injected faults of several kinds, and what they need."""

# SPDX-License-Identifier: Apache-2.0
import time
from dataclasses import replace

import pytest
import torch

from nvfp4_moe.cases import inputs
from nvfp4_moe.cases.quantize import Case
from nvfp4_moe.differential.compare import compare, run_reference
from nvfp4_moe.failures import minimize
from nvfp4_moe.reference.recipe import Recipe, SfLayout

CASE = Case("per-token", Recipe(), SfLayout.layout_128x4)


def failure_where(where, case=CASE):
    """(fails, calls): the reference against itself with a bit wrong in the blocks that `where` marks."""
    calls = []

    def fails(x):
        assert x.dim() == 2 and x.shape[0] and x.shape[1] and x.shape[1] % 16 == 0
        calls.append(tuple(x.shape))
        right = run_reference(x, case)
        wrong = right.codes.unflatten(1, (-1, 8)).clone()
        wrong[..., 0] ^= where(x.unflatten(1, (-1, 16))).to(torch.uint8)
        return compare(x, case, right, replace(right, codes=wrong.flatten(1))) is not None

    return fails, calls


def matrix(m=64, k=4096, seed=0):
    x = inputs.synthetic("normal", m, k, seed=seed)
    x[min(37, m - 1), k // 16 // 5 * 16 + 3] = 7.25  # a value that nothing else has
    return x


def with_the_value(blocks):
    return (blocks == 7.25).any(-1)


def test_a_value_in_one_block():
    fails, calls = failure_where(with_the_value)
    start = time.monotonic()
    small = minimize.minimize_tensor(matrix(), fails)
    assert time.monotonic() - start < 30
    assert len(calls) < 60
    assert small.shape == (1, 16) and small.dtype == torch.bfloat16
    assert small[small != 0].tolist() == [7.25]


def test_where_to_look_first_spares_calls():
    fails, calls = failure_where(with_the_value)
    minimize.minimize_tensor(matrix(), fails)
    without, _ = len(calls), calls.clear()
    small = minimize.minimize_tensor(matrix(), fails, place=(37, 51))
    assert small.shape == (1, 16) and small[small != 0].tolist() == [7.25]
    assert len(calls) < without - 15


def test_a_maximum_elsewhere():
    """The wrong block needs a larger element in another block of its row."""

    def where(blocks):
        tops = blocks.abs().amax(-1)
        others = tops.amax(-1, keepdim=True) >= 4 * tops
        return others & (blocks == 7.25).any(-1)

    x = matrix()
    x[37, 4000] = 1000.0
    small = minimize.minimize_tensor(x, failure_where(where)[0])
    assert small.shape == (1, 32)
    first, second = small[small != 0].tolist()
    assert (
        first == 7.25
        and second >= 29
        and second == 2.0 ** round(torch.tensor(second).log2().item())
    )


@pytest.mark.parametrize("zeros_cure_it", [False, True])
def test_columns_beyond_2048(zeros_cure_it):
    """Columns cannot go below what the place needs, and what cannot be zero stays."""

    def where(blocks):
        wrong = (blocks >= 1.5).any(-1)
        wrong[:, :128] = False
        if zeros_cure_it:
            wrong &= (blocks[:, :100] != 0).any(-1).all(-1, keepdim=True)
        return wrong

    fails, calls = failure_where(where)
    small = minimize.minimize_tensor(matrix(), fails)
    assert small.shape == (1, 129 * 16)
    assert fails(small)
    nonzero = (small != 0).sum()
    assert nonzero == (101 if zeros_cure_it else 1)
    if not zeros_cure_it:
        assert len(calls) < 120
        assert small[small != 0].tolist() == [2.0]  # the least power of two above


def test_rows_beyond_a_tile():
    def where(blocks):
        wrong = (blocks == 7.25).any(-1)
        wrong[:16] = False
        return wrong

    small = minimize.minimize_tensor(matrix(k=64), failure_where(where)[0])
    assert small.shape == (17, 16)
    assert small[small != 0].tolist() == [7.25] and small[16].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_become_simple(dtype):
    case = CASE if dtype != torch.float32 else replace(CASE, mode="fp32 per-token")
    fails, _ = failure_where(lambda b: ((b > 1.3) & (b < 1.6)).any(-1) & (b < -0.1).any(-1), case)
    x = inputs.synthetic("normal", 8, 128, dtype)
    small = minimize.minimize_tensor(x, fails)
    assert small.shape == (1, 16) and small.dtype == dtype
    assert sorted(small[small != 0].tolist()) == [-1.0, 1.5]


def test_specials_that_matter_stay():
    x = inputs.synthetic("normal", 4, 64)
    x[1, 20], x[1, 25] = torch.nan, -0.0
    negative_zero = torch.tensor(-0.0).bfloat16().view(torch.int16)
    fails, _ = failure_where(
        lambda b: b.isnan().any(-1) & (b.contiguous().view(torch.int16) == negative_zero).any(-1)
    )
    small = minimize.minimize_tensor(x, fails)
    assert small.shape == (1, 16) and small.isnan().sum() == 1
    assert (small.view(torch.int16) != 0).sum() == 2


def test_a_block_of_nothing_but_a_negative_zero():
    x = inputs.synthetic("normal", 4, 64)
    x[2, 16:32] = 0.0
    x[2, 25] = -0.0
    fails, _ = failure_where(lambda b: (b == 0).all(-1) & torch.signbit(b).any(-1))
    small = minimize.minimize_tensor(x, fails)
    assert small.shape == (1, 16) and fails(small)
    assert (small == 0).all() and torch.signbit(small).sum() == 1


def test_the_budget_is_kept():
    calls = []

    def slow(x):
        calls.append(x.shape)
        time.sleep(0.2)
        return bool((x == 7.25).any())

    start = time.monotonic()
    small = minimize.minimize_tensor(matrix(k=256), slow, seconds=1.1)
    assert time.monotonic() - start < 1.6
    assert 3 <= len(calls) <= 6
    assert small.numel() < 64 * 256 and (small == 7.25).any()


def test_what_cannot_be_shrunk():
    with pytest.raises(ValueError, match="does not fail"):
        minimize.minimize_tensor(matrix(2, 32), lambda x: False)
    for x in (torch.zeros(16), torch.zeros(2, 24), torch.zeros(0, 16), torch.zeros(1, 16).int()):
        with pytest.raises(ValueError, match=r"x is torch\.\w+ of shape"):
            minimize.minimize_tensor(x, lambda x: True)
    assert minimize.minimize_tensor(matrix(2, 32), lambda x: True).tolist() == [[0.0] * 16]


def test_fewest_is_minimal_and_logarithmic():
    for needed in ({5}, {0, 1023}, {3, 400, 401, 900}):
        calls = []

        def fails(of, needed=needed, calls=calls):
            calls.append(len(of))
            return needed <= set(of)

        assert set(minimize.fewest(range(1024), fails)) == needed
        assert len(calls) <= 5 * len(needed) * 10 + 2 * len(needed)
    assert minimize.fewest([1, 2, 3], lambda of: True, minimum=1) == [3]
    # 1 can go at once, and 0 only after it.
    assert minimize.fewest([0, 1], lambda of: 0 in of or 1 not in of) == []
