"""The product of two NVFP4 matrices with a scale for each row, and torch's bf16 product beside it.

A call moves both matrices' codes and block scales, alpha and the output. Codes and scales are such that
every sum is exact in fp32, so that all backends have to give the same bits. Calls take several copies of
the weights by turns, which come from memory and not from a cache.
"""

# SPDX-License-Identifier: Apache-2.0
import itertools
from collections.abc import Callable

import torch

from ..kernels.dense.api import BACKENDS, explain_mm_fp4, mm_fp4
from ..reference import dense as reference
from ..reference.layouts import padded_shape
from ..reference.recipe import SfLayout
from .case import Case, NotHere, Operation, Prepared, Selection, WrongResult

BF16 = "torch, bf16"
"""torch's product of bf16 matrices, cuBLAS' on a GPU: the baseline."""
_SIZES = ((1024, 2048), (4096, 4096), (4096, 7168), (7168, 4096), (7168, 7168), (36864, 7168))
"""The last is gate and up of DeepSeek-V3's dense layers."""
SHAPES = {f"N={n} K={k}": (n, k) for n, k in _SIZES}
_CACHE = 256 << 20  # more bytes than any GPU's cache
_CHECKED = 128
"""Rows and columns of the output that are compared with the reference."""
Product = Callable[..., torch.Tensor]
"""Computes [M, N] bf16 from a, its scales, b [N, K/2], its scales, and alpha [M]."""


def prepare(case: Case, device: torch.device) -> Prepared:
    """Make a call for random operands."""
    m, (n, k) = case.tokens, SHAPES[case.shape]
    copies = max(2, _CACHE // (n * k // 2)) if device.type == "cuda" else 2
    if case.backend == BF16:
        x = _normal(m, k, device)
        matrices = itertools.cycle([_normal(n, k, device) for _ in range(min(8, copies))])
        return Prepared(lambda: x @ next(matrices).T, 2 * m * n * k, 2 * (m * k + n * k + m * n))
    a, a_scales = operand(m, k, device)
    alpha = torch.rand(m, dtype=torch.float32, device=device) + 0.5
    weights = [operand(n, k, device) for _ in range(copies)]
    turn = itertools.cycle(weights)
    b, b_scales = next(turn)
    explanation = explain_mm_fp4(a, b.T, a_scales, b_scales.T, alpha)
    if (reason := explanation.reason(case.backend)) is not None:
        raise NotHere(reason)

    def product(*operands: torch.Tensor) -> torch.Tensor:
        a, a_scales, b, b_scales, alpha = operands
        return mm_fp4(a, b.T, a_scales, b_scales.T, alpha, backend=case.backend)

    if case.backend != "reference" and not agrees(product, a, a_scales, b, b_scales, alpha):
        raise WrongResult(f"bits differ from the reference's: {case.id}")
    return Prepared(
        lambda: product(a, a_scales, *next(turn), alpha),
        2 * m * n * k,
        (m + n) * k * (1 / 2 + 1 / 16) + 4 * m + 2 * m * n,
        capturable=case.backend != "reference",
    )


def operand(rows: int, k: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Make codes [rows, K/2] of every value and 128x4 block scales of 1/2 to 2, both uint8.

    Half of the codes are 0, so that sums are exact for K up to 7168.
    """
    codes = torch.randint(0, 256, (rows, k // 2), dtype=torch.uint8, device=device)
    keep = torch.rand(rows, k // 2, dtype=torch.float32, device=device) < 0.5
    shape = padded_shape(rows, k // 16, SfLayout.layout_128x4)
    scales = torch.randint(6, 9, shape, dtype=torch.uint8, device=device) * 8
    return torch.where(keep, codes, 0), scales


def agrees(
    product: Product,
    a: torch.Tensor,
    a_scales: torch.Tensor,
    b: torch.Tensor,
    b_scales: torch.Tensor,
    alpha: torch.Tensor,
) -> bool:
    """Return True if the first rows and columns of a product have the reference's bits."""
    m = min(a.shape[0], _CHECKED)
    got = product(a, a_scales, b, b_scales, alpha)[:m, :_CHECKED]
    want = reference.mm_fp4(
        a[:m], b[:_CHECKED].T, a_scales[:128], b_scales[:128].T, alpha[:m], torch.bfloat16
    )
    return torch.equal(got.view(torch.int16), want.view(torch.int16))


def _normal(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    return torch.randn(rows, columns, dtype=torch.float32, device=device).bfloat16()


_ROWS = (1, 16, 32, 64, 128, 1024, 8192)
DENSE = Operation(
    "dense",
    "rows",
    Selection(tuple(SHAPES), _ROWS, (*BACKENDS, BF16)),
    {
        "cpu": Selection(("N=1024 K=2048",), (1, 128), ("reference", BF16)),
        "cuda": Selection(
            ("N=4096 K=4096", "N=7168 K=7168"),
            (1, 128, 8192),
            (*(b for b in BACKENDS if b != "reference"), BF16),
        ),
    },
    BF16,
    prepare,
)
