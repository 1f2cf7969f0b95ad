"""Statistics of the Triton mixture of experts, in the interpreter."""

# SPDX-License-Identifier: Apache-2.0
import pytest
import statistics_cases
from nvfp4_moe.kernels.target import INTERPRETING

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not INTERPRETING, reason="set TRITON_INTERPRET=1 to run the interpreter"),
]


@pytest.mark.parametrize("case", statistics_cases.ON_TRITON, ids=lambda f: f.__name__)
def test_case(case):
    case("cpu")
