"""The dense product's GEMM for sm_90 on that GPU, against the reference."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import dense_cases
import pytest
import torch
from assertions import assert_bitwise

from nvfp4_moe.kernels.dense.hopper import CONFIGS, HALVES
from nvfp4_moe.kernels.moe.hopper.config import refusal
from nvfp4_moe.kernels.triton_target import arch
from nvfp4_moe.reference.layouts import from_linear, to_linear
from nvfp4_moe.reference.recipe import SfLayout


def _refusal() -> str | None:
    if not torch.cuda.is_available():
        return "no GPU here"
    return refusal(arch(torch.device("cuda")))


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_refusal() is not None, reason=str(_refusal()))]

EVERY = (*CONFIGS, *HALVES)
ROWS = (1, 7, 8, 16, 33, 64, 128, 255, 1000)
"""Counts of rows at the edges of tiles."""


@pytest.mark.parametrize("config", [CONFIGS[1], CONFIGS[4], HALVES[1]], ids=str)
@pytest.mark.parametrize("alpha", dense_cases.ALPHAS)
def test_every_alpha_and_layout(config, alpha):
    for use_8x4 in (False, True):
        for dtype in (torch.bfloat16, torch.float16):
            case = dense_cases.coarse(33, 40, 192, alpha=alpha, use_8x4=use_8x4, dtype=dtype)
            dense_cases.bitwise(case, "cuda", config, f"{alpha} {use_8x4} {dtype}")


@pytest.mark.parametrize("config", EVERY, ids=str)
@pytest.mark.parametrize("n,k", [(1, 64), (129, 192), (1000, 2880), (4133, 1088), (36867, 320)])
def test_edges_of_tiles(config, n, k, unwritten_memory_is_nan):
    """Odd N and odd multiples of a tile of block scales; what pads the scales is NaN.

    Of 36,867 columns there are more tiles than programs, and no multiple of them: they are shared.
    """
    for m in ROWS:
        case = dense_cases.with_poisoned_padding(dense_cases.coarse(m, n, k, use_8x4=m == 33))
        dense_cases.bitwise(case, "cuda", config, f"{m} rows")


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("n,k", [(4133, 1088), (2056, 7168), (36867, 320), (40, 2112)])
def test_sums_that_round(m, n, k):
    """Inside the intervals of sums over contiguous ranges of K, with the tiles of the table."""
    dtype = torch.float16 if m % 2 else torch.bfloat16
    dense_cases.close(dense_cases.real(m, n, k, use_8x4=m == 33, dtype=dtype), "cuda")


def rows_of(case: dense_cases.Case, rows: torch.Tensor) -> dense_cases.Case:
    """Take some rows of a case whose scales are in 128x4."""
    blocks = case.a.shape[1] // 8
    linear = to_linear(case.a_scales, case.a.shape[0], blocks, SfLayout.layout_128x4)
    scales = from_linear(linear[rows].contiguous(), SfLayout.layout_128x4)
    return replace(case, a=case.a[rows].contiguous(), a_scales=scales, alpha=case.alpha[rows])


@pytest.mark.parametrize("n,k", [(4133, 1088), (2056, 7168), (36867, 704)])
def test_batch_invariant(n, k):
    """A row alone, and at some place of up to 4096 rows: its random terms round at every step."""
    case = dense_cases.real(4096, n, k)
    row = 1234
    alone = dense_cases.output_of(rows_of(case, torch.tensor([row])), "cuda")[0]
    for m in (2, 7, 8, 9, 16, 17, 33, 64, 65, 128, 255, 256, 257, 1000, 4096):
        others = torch.randperm(4096, generator=torch.Generator().manual_seed(m))[:m]
        others[others == row] = 7
        others[m // 3] = row
        got = dense_cases.output_of(rows_of(case, others), "cuda")[m // 3]
        assert_bitwise(got, alone, f"among {m}")


@pytest.mark.parametrize("config", EVERY, ids=str)
def test_every_tile_has_the_same_bits(config):
    case = dense_cases.real(1000, 2056, 4096)
    want = dense_cases.output_of(case, "cuda", CONFIGS[-1])
    assert_bitwise(dense_cases.output_of(case, "cuda", config), want, str(config))


@pytest.mark.parametrize("m", [1, 16, 33, 1000])
def test_every_run_has_the_same_bits(m):
    case = dense_cases.real(m, 36867, 704).to("cuda")
    want = dense_cases.output_of(case, "cuda")
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(200):
        different += (dense_cases.output_of(case, "cuda") != want).any()
    assert different.item() == 0
