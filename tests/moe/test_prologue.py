"""Few tokens are sorted and written in one launch, to the bits of the launches that it replaces."""

# SPDX-License-Identifier: Apache-2.0
import prologue_cases
import pytest

from nvfp4_moe.kernels.moe.hopper.prologue import serves

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("columns", prologue_cases.WIDTHS)
@pytest.mark.parametrize("form", prologue_cases.FORMS, ids=str)
def test_equal(form, columns):
    prologue_cases.equal("cpu", form, columns)


@pytest.mark.parametrize(
    "tokens,top_k,experts,offset", [(1, 1, 1, 0), (1, 8, 33, 3), (16, 5, 7, 1)]
)
def test_equal_for_other_routings(tokens, top_k, experts, offset):
    recipe = prologue_cases.RECIPES[0]
    prologue_cases.equal("cpu", recipe, 128, tokens, top_k, experts, offset)


def test_it_serves_few_tokens_alone():
    assert serves(1, 8, 2048) and serves(16, 8, 7168) and serves(11, 22, 1024)
    assert not serves(0, 8, 2048) and not serves(17, 1, 2048)
    assert not serves(16, 22, 1024) and not serves(1, 8, 32768)
