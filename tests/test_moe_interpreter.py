"""The Triton mixture of experts in the interpreter, against the reference."""

# SPDX-License-Identifier: Apache-2.0
import moe_triton_cases
import pytest
from nvfp4_moe.kernels import moe
from nvfp4_moe.kernels.target import INTERPRETING

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not INTERPRETING, reason="set TRITON_INTERPRET=1 to run the interpreter"),
]


@pytest.mark.parametrize("case", moe_triton_cases.CASES, ids=lambda f: f.__name__)
def test_case(case):
    case("cpu")


@pytest.mark.parametrize("ring", [1, 1 << 28])
def test_weights_decoded_before(ring, monkeypatch):
    """One expert's at a time, and all."""
    monkeypatch.setattr(moe, "_DECODED_BYTES", ring)
    for case in (moe_triton_cases.odd_sizes, moe_triton_cases.expert_parallel):
        case("cpu", moe.GemmConfig(128, 16, 64, 1, 4, decoded=True))


@pytest.mark.parametrize(
    "tokens,experts,top_k", [(1, 4, 4), (37, 6, 3), (300, 20, 8), (700, 20, 8)]
)
@pytest.mark.parametrize("offset,local", [(0, None), (2, 3)])
def test_permutation(tokens, experts, top_k, offset, local):
    moe_triton_cases.permutation("cpu", tokens, experts, top_k, offset, local or experts)
