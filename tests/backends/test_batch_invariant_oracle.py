"""The reference of FlashInfer's batch-invariant quantizers, which runs on a CPU, beside ours.

Theirs (`batch_invariant/quantization/nvfp4_reference.py`, since 0.7.4) evaluates the specification that
their kernels execute. It is our exact arithmetic of the CuTe-DSL build in every bit but one rule: a row
of nothing but zeros and NaN has the per-token scale 1 / FLT_MAX, ours 0.
"""

# SPDX-License-Identifier: Apache-2.0
import importlib
import importlib.util
from pathlib import Path

import pytest
import torch
from assertions import assert_bitwise

from nvfp4_moe.cases import inputs
from nvfp4_moe.reference.layouts import to_linear
from nvfp4_moe.reference.numerics.fp32 import FLT_MAX
from nvfp4_moe.reference.quantize import quantize_global_scale, quantize_per_token
from nvfp4_moe.reference.recipe import Recipe, SfLayout

RECIPE = Recipe("exact", build="cute-dsl")
ZERO_ROW = 1 / FLT_MAX  # fp32 2.938735877055719e-39
MOST = 1 << 17
"""Elements of a golden input, of which theirs takes seconds a million."""


@pytest.fixture(scope="module")
def theirs():
    found = importlib.util.find_spec("flashinfer")  # which imports nothing
    folders = (found and found.submodule_search_locations) or ()
    if not any(Path(folder, "batch_invariant").is_dir() for folder in folders):
        pytest.skip(
            "flashinfer.batch_invariant, which came with FlashInfer 0.7.4, is not installed"
        )
    name = "flashinfer.batch_invariant.quantization.nvfp4_reference"
    return importlib.import_module(name).quantize_reference


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
