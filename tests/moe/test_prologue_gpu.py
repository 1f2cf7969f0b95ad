"""Few tokens are sorted and written in one launch on a GPU, to the bits of the launches it replaces."""

# SPDX-License-Identifier: Apache-2.0
import prologue_cases
import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]


@pytest.mark.parametrize("columns", (*prologue_cases.WIDTHS, 7168))
@pytest.mark.parametrize("form", prologue_cases.FORMS, ids=str)
def test_equal(form, columns):
    for tokens in (1, 2, 3, 8, 16):
        prologue_cases.equal("cuda", form, columns, tokens)


@pytest.mark.parametrize(
    "experts,top_k,offset", [(128, 8, 0), (32, 8, 32), (512, 16, 0), (1, 1, 0)]
)
def test_equal_for_every_count_of_tokens(experts, top_k, offset):
    for tokens in range(1, 17):
        prologue_cases.equal(
            "cuda", prologue_cases.RECIPES[0], 1024, tokens, top_k, experts, offset
        )
