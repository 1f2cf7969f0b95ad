"""The Triton mixture of experts in the interpreter, against the reference."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import moe_triton_cases
import pytest
import torch
from assertions import assert_bitwise
from moe_cases import Shape
from mutants.generated.strict import codes_multiplied

from nvfp4_moe.kernels.gemm_config import GemmConfig
from nvfp4_moe.kernels.moe import launch
from nvfp4_moe.reference.activation import ActivationType

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("case", moe_triton_cases.CASES, ids=lambda f: f.__name__)
def test_case(case):
    case("cpu")


def test_codes_multiplied_as_they_are():
    """The path of GPUs with a block-scaled MMA, with that instruction spelled out."""
    for case in (moe_triton_cases.odd_sizes, moe_triton_cases.expert_parallel):
        with codes_multiplied():
            case("cpu", GemmConfig(128, 16, 128, 1, 4))


@pytest.mark.parametrize("ring", [1, 1 << 28])
def test_weights_decoded_before(ring, monkeypatch):
    """One expert's at a time, and all."""
    monkeypatch.setattr(launch, "_DECODED_BYTES", ring)
    for case in (moe_triton_cases.odd_sizes, moe_triton_cases.expert_parallel):
        case("cpu", GemmConfig(128, 16, 64, 1, 4, decoded=True))


def test_tiles_half_as_wide():
    """Experts with fewer rows than half a tile, with more, and with a second, nearly empty one."""
    config = GemmConfig(128, 32, 64, 1, 4)
    for case in (moe_triton_cases.odd_sizes, moe_triton_cases.expert_parallel):
        case("cpu", config)
    shape = Shape(34, 128, 128, 3, 2)
    ids = torch.tensor([[0, 1]] * 17 + [[0, 2]] * 17, dtype=torch.int32)  # rows: 32 + 2, 17, 17
    case = replace(moe_triton_cases.coarse(shape, ActivationType.Relu2), ids=ids)
    moe_triton_cases._assert_second_sums_are_exact(case, shape)
    assert_bitwise(*moe_triton_cases.both(case, "cpu", config=config), "sums that are exact")


@pytest.mark.parametrize(
    "tokens,experts,top_k", [(1, 4, 4), (37, 6, 3), (300, 20, 8), (700, 20, 8), (33000, 6, 4)]
)
@pytest.mark.parametrize("offset,local", [(0, None), (2, 3)])
def test_permutation(tokens, experts, top_k, offset, local):
    moe_triton_cases.permutation("cpu", tokens, experts, top_k, offset, local or experts)
