"""The reference of FlashInfer's batch-invariant quantizers, which runs on a CPU, beside ours.

Theirs (`batch_invariant/quantization/nvfp4_reference.py`, since 0.7.4) evaluates the specification that
their kernels execute. It is our exact arithmetic of the CuTe-DSL build in every bit but one rule: a row
of nothing but zeros and NaN has the per-token scale 1 / FLT_MAX, ours 0.

Their definition of the product (`gemm/batch_invariant/spec.py`) leaves one step of a tensor core open.
It runs here with a step of ours, and gives the bits of our folds.
"""

# SPDX-License-Identifier: Apache-2.0
import importlib
import importlib.util
from pathlib import Path

import dense_cases
import pytest
import torch
from assertions import assert_bitwise, assert_inside

from nvfp4_moe.cases import inputs
from nvfp4_moe.differential.conforming import cut_step, folded
from nvfp4_moe.reference import dense
from nvfp4_moe.reference.bounds.accumulation import kchunk
from nvfp4_moe.reference.bounds.dense import mm_fp4_bounds
from nvfp4_moe.reference.bounds.fold import chunks_of
from nvfp4_moe.reference.layouts import to_linear
from nvfp4_moe.reference.numerics.fp32 import FLT_MAX
from nvfp4_moe.reference.quantize import quantize_global_scale, quantize_per_token
from nvfp4_moe.reference.recipe import Recipe, SfLayout

RECIPE = Recipe("exact", build="cute-dsl")
ZERO_ROW = 1 / FLT_MAX  # fp32 2.938735877055719e-39
MOST = 1 << 17
"""Elements of a golden input, of which theirs takes seconds a million."""


def imported(name: str):
    """A module of FlashInfer's batch-invariant operations."""
    found = importlib.util.find_spec("flashinfer")  # which imports nothing
    folders = (found and found.submodule_search_locations) or ()
    if not any(Path(folder, "batch_invariant").is_dir() for folder in folders):
        pytest.skip(
            "flashinfer.batch_invariant, which came with FlashInfer 0.7.4, is not installed"
        )
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def theirs():
    name = "flashinfer.batch_invariant.quantization.nvfp4_reference"
    return imported(name).quantize_reference


def _patterns() -> torch.Tensor:
    """[4096, 16]: all 65,536 of bf16, in order."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16, device="cpu")
    return bits.view(torch.bfloat16).view(4096, 16)


def _matrices() -> dict[str, torch.Tensor]:
    found = {"like numbers": _patterns(), "every size in a row": _patterns().T.contiguous()}
    finite = found["every size in a row"].nan_to_num(0.0, 0.0, 0.0)
    found["every size in a row, finite"] = finite
    for edge in (False, True):
        for name, bits in inputs.golden(edge).items():
            if name.endswith("/x") and name.count("/") == 3 and bits.numel() <= MOST:
                dtype = torch.bfloat16 if name.startswith("bf16") else torch.float16
                found[f"{name}, {edge}"] = bits.view(dtype)
    return found


@pytest.fixture(scope="module")
def matrices() -> dict[str, torch.Tensor]:
    found = _matrices()
    assert len(found) > 20
    return found


def _assert_alike(ours, codes, scales, name):
    rows, columns = ours.codes.shape[0], ours.codes.shape[1] // 8
    linear = to_linear(scales.view(torch.float8_e4m3fn), rows, columns, SfLayout.layout_128x4)
    assert_bitwise(ours.codes, codes, f"{name}: codes")
    assert_bitwise(ours.block_scales.view(torch.uint8), linear.view(torch.uint8), f"{name}: scales")


def test_per_token(theirs, matrices):
    zero_rows = 0
    for name, x in matrices.items():
        ours = quantize_per_token(x, RECIPE.base_scale_inv, RECIPE)
        codes, scales, token = theirs(x, RECIPE.base_scale_inv, per_token=True)
        _assert_alike(ours, codes, scales, name)
        zero = x.nan_to_num(0.0).abs().amax(1) == 0
        zero_rows += int(zero.sum())
        want = torch.where(zero, ZERO_ROW, ours.per_token_scale)
        assert_bitwise(want, token, f"{name}: per-token scales")
    assert zero_rows


def test_global_scale(theirs, matrices):
    for name, x in matrices.items():
        for scale in (1.0, 0.07, 3e5):
            ours = quantize_global_scale(x, scale, RECIPE)
            codes, scales, _ = theirs(x, scale)
            _assert_alike(ours, codes, scales, f"{name}, scale {scale}")


class TheirProduct:
    """Numbers for FlashInfer's definition: a step of K is its index, a sum is fp32 [M, N]."""

    def __init__(self, x, w):
        self.products = (x[:, None] * w[None]).double()

    def op(self, name, *given):
        if name == "a_rows":  # row, step: all rows at once
            return given[1]
        if name == "absf_kslice":
            return given[0]
        if name == "mma_nvfp4_k64":
            total, step = given
            products = self.products[..., 64 * step : 64 * step + 64]
            return cut_step(total.double(), products, 1).float()
        assert name in ("sfa_rows", "b_cols", "sfb_cols"), name
        return None

    def const(self, value):
        return torch.full(self.products.shape[:2], value, dtype=torch.float32, device="cpu")

    def add(self, a, b):
        return a + b

    def mul(self, a, b):
        return a * b

    def cvt_out(self, x, name):
        return x.to({"bf16": torch.bfloat16, "f16": torch.float16}[name])


@pytest.mark.parametrize(("n", "k"), [(48, 256), (16, 1024), (8, 1024), (40, 208)])
def test_the_fold_of_a_product(n, k):
    spec = imported("flashinfer.gemm.batch_invariant.spec")
    case = dense_cases.real(33, n, k)
    x, w = dense.operands(case.a, case.b_rows.T, case.a_scales, case.b_scales.T)
    fp, accumulation, alpha = TheirProduct(x, w), kchunk(n, k), case.alpha[:1]
    chunks = accumulation.fold.chunks
    definition = spec.reduction(k, 0, 0, "nvfp4")
    if chunks > 1:
        definition = spec.reduction_chunked(k, chunks, 0, 0, "nvfp4")
    total = definition.canonical(fp)
    assert_bitwise(folded(accumulation.fold, 1)(x, w), total, accumulation.name)
    arguments = case.arguments | {"alpha": alpha}
    allowed = mm_fp4_bounds(**arguments, accumulation=accumulation)
    assert_inside(spec.output_elem(fp, total, "bf16", alpha), allowed, accumulation.name)


def test_the_number_of_chunks():
    schedule = imported("flashinfer.gemm.batch_invariant.schedule")
    sizes = [*range(16, 4097, 208), *(2**i for i in range(4, 16)), 5120, 7168, 14336, 28672]
    counts = {
        (n, k): schedule.chunks_for(n, k, "nvfp4")
        for n in (0, 1, 8, 16, 24, 64, 128, 256, 576, 2048, 7168, 8160, 8192)
        for k in sizes
    }
    assert len(set(counts.values())) > 5
    assert {(n, k): chunks_of(n, k) for n, k in counts} == counts
