"""Statistics of the Triton mixture of experts, in the interpreter."""

# SPDX-License-Identifier: Apache-2.0
import pytest
import statistics_cases

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("case", statistics_cases.ON_TRITON, ids=lambda f: f.__name__)
def test_case(case):
    case("cpu")
